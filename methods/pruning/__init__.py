"""Pruning: weights, heads and channels that are taken out."""
