"""Saving, loading and exporting compressed models, with a model card and, on request, their code."""
