"""Training before compression that reduces the loss from it: regularizers and the run."""
