"""Interaction with the rest of Lightning: guards, limits, precision, loss, checkpoints, callbacks and loggers."""
