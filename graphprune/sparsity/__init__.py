"""Sparsity in patterns that runtimes have fast arithmetic for: which weights, which elements, and the proof."""
