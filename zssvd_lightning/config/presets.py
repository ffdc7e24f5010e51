"""Presets: published methods by name, each a YAML file with settings and a citation of its source."""

from importlib.resources import files
from typing import Any

import yaml

FOLDER = files("zssvd_lightning.config") / "presets"


PRESETS = tuple(sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml")))
"""Names of the presets."""


def settings_of(preset: str) -> dict[str, Any]:
    """Return the fields of `CompressionConfig` that a preset sets. Raises KeyError for an unknown preset."""
    if preset not in PRESETS:
        raise KeyError(preset)
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text(encoding="utf-8"))
    return settings
