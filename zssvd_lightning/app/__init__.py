"""Whole runs around the method: the command line, comparisons, pictures."""
