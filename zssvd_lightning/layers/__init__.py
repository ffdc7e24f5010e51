"""Forms of a compressed linear layer, and the cost of each. Imports nothing else from this package."""
