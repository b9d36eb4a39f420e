"""Helpers of the tests that state laws: single ops with an open boundary, random graphs."""
