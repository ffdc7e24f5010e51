"""Example runs to copy from, one per file. Start each with `python -m recipes.NAME` in this repository."""
