"""Batches to statistics: masks, hooks, recorded calls, and the collector."""
