"""The method: the course of a compression, the engine that carries it out, its report, and `compress()`."""
