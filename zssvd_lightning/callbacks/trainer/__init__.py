"""Dealings with the rest of Lightning: guards, limits, precision, loss, checkpoints, other callbacks, loggers."""
