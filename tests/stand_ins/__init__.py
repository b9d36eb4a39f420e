"""Packages that stand in for foreign ones, put before the installed ones by PYTHONPATH.

What they do is said by the environment variable STAND_IN (JSON); what is done with them they write to the file that
STAND_IN_CALLS names, a JSON list a line.
"""
