"""Serve compressed models in vLLM."""
