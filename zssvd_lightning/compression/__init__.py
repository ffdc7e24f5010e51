"""Compression: the sequence of stages, the engine that runs them, the report, and `compress()`."""
