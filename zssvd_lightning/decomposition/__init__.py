"""Statistics to spectra of all layers, truncated weights, and the original weights kept beside them."""
