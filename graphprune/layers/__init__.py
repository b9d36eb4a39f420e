"""Layers as matrices: their weights, their inputs streamed, and runs with weights free to change."""
