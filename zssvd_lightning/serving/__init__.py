"""Serving of compressed models in vLLM."""
