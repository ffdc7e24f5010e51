"""Decomposition of all layers into spectra, truncation of the weights, and copies of the original weights."""
