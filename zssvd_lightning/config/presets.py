"""Presets: published methods by name, each a YAML file with settings and a citation of its source.

Files in `presets/trained` are presets of a compression and the training that follows it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import yaml

from zssvd_lightning.errors import ContradictionError

FOLDER = files("zssvd_lightning.config") / "presets"


PRESETS = tuple(sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml")))
"""Names of the presets."""


TRAINED = tuple(
    sorted(file.name.removesuffix(".yaml") for file in (FOLDER / "trained").iterdir() if file.name.endswith(".yaml"))
)
"""Names of the presets of a compression and the training after it, for runs and `ZSSVDCallback`."""


DEFAULT_TRAINED = "best-trained"
"""Preset whose training follows where a user asks for one and says no more."""


DEFAULT = "best"
"""Preset whose settings apply where a user names none."""


def settings_of(preset: str) -> dict[str, Any]:
    """Return the fields of `CompressionConfig` that a preset sets. Raises KeyError for an unknown preset."""
    if preset not in PRESETS:
        raise KeyError(preset)
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text(encoding="utf-8"))
    return settings


def trained_by(preset: str) -> tuple[str, dict[str, Any]]:
    """Return the preset of the compression, and the settings of the recovery, of a preset in `TRAINED`.

    Raises KeyError for another preset.
    """
    if preset not in TRAINED:
        raise KeyError(preset)
    settings: dict[str, Any] = yaml.safe_load((FOLDER / "trained" / f"{preset}.yaml").read_text(encoding="utf-8"))
    return settings["preset"], settings["recovery"]


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
