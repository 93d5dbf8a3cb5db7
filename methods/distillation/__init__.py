"""Distillation: a small model, the student, learns from a larger one, its teacher."""
