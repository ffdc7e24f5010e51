"""The mathematics of one layer: second moments, metrics, whitening, spectrum and scores, rounding."""
