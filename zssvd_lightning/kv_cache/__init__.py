"""Low-rank key-value cache for generation: bases of keys and values from a calibration pass, and the cache in them."""
