"""Hidden widths with fewer units, in a compression."""
