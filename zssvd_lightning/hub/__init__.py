"""Save, load and export compressed models, with model card and carried code."""
