"""Measure a model: perplexity and zero-shot accuracy."""
