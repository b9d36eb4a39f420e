"""Sparsity in patterns that runtimes have fast arithmetic for: which weights, which of their elements, and the proof."""
