"""Loading of models and texts from packages, files and the hub."""
