"""Modules whose weights are compressed as linear layers: stacked experts and convolutions."""
