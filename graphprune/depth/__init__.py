"""Whole residual branches: what they are and how they are removed."""
