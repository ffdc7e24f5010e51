"""Presets: published methods by name, each a YAML file with settings and a citation of its source."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import yaml

from zssvd_lightning.errors import ContradictionError

FOLDER = files("zssvd_lightning.config") / "presets"


PRESETS = tuple(sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml")))
"""Names of the presets."""


DEFAULT = "best"
"""Preset whose settings apply where a user names none."""


def settings_of(preset: str) -> dict[str, Any]:
    """Return the fields of `CompressionConfig` that a preset sets. Raises KeyError for an unknown preset."""
    if preset not in PRESETS:
        raise KeyError(preset)
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text(encoding="utf-8"))
    return settings


@contextmanager
def explaining_default(applies: bool) -> Iterator[None]:
    """Add to a ContradictionError where the settings that were not given come from, if the default preset applies."""
    try:
        yield
    except ContradictionError as error:
        if not applies:
            raise
        raise ContradictionError(
            f"{error}. Settings that are not given are those of preset {DEFAULT!r}, because no preset is named; name "
            "another one, such as 'zs-svd'"
        ) from error
