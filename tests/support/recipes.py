"""Settings of the recipes, for tests."""

from pathlib import Path
from typing import Any

from zssvd_lightning.sources.models import load_model
from zssvd_lightning.sources.texts import load_text


def beginning(source: str, file: Path, characters: int) -> str:
    """Write the beginning of a text, which takes less time to tokenize; return the file as a source."""
    file.write_text(load_text(source)[:characters])
    return str(file)


def shorten_texts(settings: dict[str, Any], folder: Path, characters: int) -> None:
    """Has a recipe read the beginnings of its texts, from files in `folder`."""
    for name in ("train", "validation"):
        settings["data"][name] = beginning(settings["data"][name], folder / f"{name}.txt", characters)


def save_first_blocks(source: str, folder: Path, count: int) -> str:
    """Save a pretrained model without the blocks after the first `count`, in float32; return the folder as a source."""
    model, tokenizer = load_model(source)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
