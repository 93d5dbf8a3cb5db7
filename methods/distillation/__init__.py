"""Distillation: students that learn from another model's probabilities or words."""
