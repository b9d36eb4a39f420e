"""Choosing what goes: budgets, scopes, allocation, sensitivity, searches."""
