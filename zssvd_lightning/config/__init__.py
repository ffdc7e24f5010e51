"""Everything that can be asked for: compression settings, presets, and reading YAML into dataclasses."""
