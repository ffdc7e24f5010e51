"""Compression within the Trainer of transformers."""
