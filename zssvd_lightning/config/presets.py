"""The methods of the field by name: each a few settings, in a YAML file that cites its source."""

from importlib.resources import files
from typing import Any

import yaml

FOLDER = files("zssvd_lightning.config") / "presets"


PRESETS = tuple(sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml")))
"""Names of them."""


def settings_of(preset: str) -> dict[str, Any]:
    """Fields of `CompressionConfig` that a preset sets. Raises KeyError when there is none of that name."""
    if preset not in PRESETS:
        raise KeyError(preset)
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text(encoding="utf-8"))
    return settings
