"""Per-layer mathematics: second moments, metrics, whitening, spectra, sensitivities and rounding costs."""
