"""Memory of a compression: its formulas, the choice of a way within limits, and what is said and refused of it."""
