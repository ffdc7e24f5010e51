"""Statistics of experts: which tokens they get, and means over the experts of a layer."""
