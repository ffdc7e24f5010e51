"""Settings of the recipes, for tests."""

from pathlib import Path
from typing import Any

from zssvd_lightning.sources.texts import load_text


def shorten_texts(settings: dict[str, Any], folder: Path, characters: int) -> None:
    """Has a recipe read the beginnings of its texts, from files in `folder`: less to tokenize."""
    for name in ("train", "validation"):
        text = folder / f"{name}.txt"
        text.write_text(load_text(settings["data"][name])[:characters])
        settings["data"][name] = str(text)
