"""Models and texts from packages, files and the hub."""
