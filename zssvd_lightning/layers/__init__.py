"""The forms a compressed linear layer can have, and what each costs. Imports nothing else of this package."""
