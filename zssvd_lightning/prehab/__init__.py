"""Train before compression, so that less is lost by it: regularizers and the run."""
