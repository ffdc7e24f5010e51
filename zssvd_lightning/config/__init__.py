"""Compression settings, presets, and loading of YAML files into dataclasses."""
