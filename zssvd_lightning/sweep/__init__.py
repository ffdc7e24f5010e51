"""Statistics of a model block by block, for models whose statistics do not fit in memory."""
