"""Checks that weight files match their config, before anything is loaded from them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from zssvd_lightning.errors import SavedModelError


def digest(path: str | Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal.

    Raises:
        SavedModelError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SavedModelError(f"{path} cannot be read: {error}; copy the folder again") from error


def refuse_changed(files: Iterable[str | Path], digests: Mapping[str, str]) -> None:
    """Raise SavedModelError for weight files that are not safetensors or have changed since they were saved.

    Args:
        files: the files to load.
        digests: SHA-256 digest of each file, by file name; when empty, digests are not compared.
    """
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise SavedModelError(f"{path} is no safetensors file, and nothing else is loaded; save the model again")
        if digests and digests.get(path.name) != digest(path):
            raise SavedModelError(
                f"{path} is not the file that was saved: its digest is not the one in config.json. It was cut short or "
                "changed; copy the folder again, or save the model with save_pretrained"
            )


def refuse_missing(files: Iterable[str | Path], layers: Mapping[str, nn.Module]) -> None:
    """Raise SavedModelError if a tensor of a compressed layer is missing from the files or has another shape.

    For some architectures, layer names in the files differ from those in the model. Such tensors are matched by the
    ends of their names and by their shapes.

    Args:
        files: the safetensors files to load; when empty, weights come from elsewhere and nothing is checked.
        layers: the layers that will receive the weights, by name.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SavedModelError(f"{path} cannot be read: {error}; copy the folder again") from error
    if not found:
        return
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layer in layers.items():
        wanted |= {f"{name}.{part}": (part, tuple(value.shape)) for part, value in layer.state_dict().items()}
    others = [name for name in found if name not in wanted]
    parts = {part for part, _ in wanted.values()}
    renamed = Counter((part, found[name]) for name in others for part in parts if name.endswith(f".{part}"))
    for name, (part, shape) in wanted.items():
        if found.get(name) == shape:
            continue
        renamed[part, shape] -= 1
        if name in found or renamed[part, shape] < 0:
            there = list(found[name]) if name in found else "missing"
            raise SavedModelError(
                f"{name} should be {list(shape)} and is {there}; the folder does not hold the weights its config "
                "speaks of"
            )
