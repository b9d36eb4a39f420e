"""Exact removal: positions that contribute nothing, and what they leave behind."""
