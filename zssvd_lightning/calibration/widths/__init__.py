"""Hidden widths between layers: whether their order is free, and whether they can be narrower."""
