"""Axes: labels that flow along them, what couples them, and the groups that follow."""
