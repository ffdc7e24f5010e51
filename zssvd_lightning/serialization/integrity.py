"""Checks that weight files match their config, before anything is loaded from them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zssvd_lightning.errors import CalibrationError, SavedModelError
from zssvd_lightning.layers.base import CompressedLinear, is_finite

NAMED = 3
"""Maximum number of names that an error message lists."""


INTEGERS = {torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
"""Names of integer types in safetensors."""


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


def add_to_digest(into: "hashlib._Hash", tensor: Tensor) -> None:
    """Add type, shape and content of a tensor to a digest.

    Raises:
        CalibrationError: its layout is neither strided nor sparse COO, or it is nested or quantized.
    """
    tensor = tensor.detach()
    if tensor.layout not in (torch.strided, torch.sparse_coo) or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise CalibrationError(
            f"a tensor of type {tensor.dtype} is {kind}, so that it cannot be compared with that of an interrupted "
            "run; give a dense one (tensor.to_dense()), or leave resume_in out"
        )
    into.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        add_to_digest(into, tensor.indices())
        add_to_digest(into, tensor.values())
    elif tensor.numel():
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        into.update(plain.reshape(-1).view(torch.uint8).numpy().data)


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


def refuse_missing(held: Mapping[str, "Stored"], layers: Mapping[str, nn.Module]) -> None:
    """Raise SavedModelError if a tensor of a compressed layer is missing, or is of another shape or kind of type.

    For some architectures, layer names in the files differ from those in the model. Such tensors are matched by the
    ends of their names, their shapes and their types.

    Args:
        held: the tensors in the files; when empty, weights come from elsewhere and nothing is checked.
        layers: the layers that will receive the weights, by name.
    """
    if not held:
        return
    wanted: dict[str, tuple[str, Stored]] = {}
    for name, layer in layers.items():
        for part, value in layer.state_dict().items():
            wanted[f"{name}.{part}"] = part, Stored(tuple(value.shape), _kind_of(value.dtype))
    others = [name for name in held if name not in wanted]
    parts = {part for part, _ in wanted.values()}
    renamed = Counter((part, held[name]) for name in others for part in parts if name.endswith(f".{part}"))
    for name, (part, stored) in wanted.items():
        if held.get(name) == stored:
            continue
        renamed[part, stored] -= 1
        if name in held or renamed[part, stored] < 0:
            raise SavedModelError(
                f"{name} should be {stored} and is {held.get(name, 'missing')}; the folder does not hold the weights "
                "its config speaks of"
            )


class Stored(NamedTuple):
    """Shape of a tensor in a file, and the kind of its type."""

    shape: tuple[int, ...]
    kind: str
    """`floating point`, whatever the precision, or the name of the type in safetensors."""

    def __str__(self) -> str:
        return f"{list(self.shape)}, {self.kind}"


def stored_in(files: Iterable[str | Path]) -> dict[str, Stored]:
    """Return shape and type of every tensor in safetensors files, by name.

    Raises:
        SavedModelError: a file cannot be read.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    kind = "floating point" if kind.startswith(("F", "BF")) else kind
                    found[name] = Stored(tuple(part.get_shape()), kind)
        except (SafetensorError, OSError) as error:
            raise SavedModelError(f"{path} cannot be read: {error}; copy the folder again") from error
    return found


def are_dense(held: Mapping[str, Stored], layers: Iterable[Iterable[str]]) -> bool:
    """Return True if the files hold a dense weight for every layer, given its possible names; no other form has one."""
    return all(any(f"{name}.weight" in held for name in names) for names in layers)


def refuse_not_loaded(model: nn.Module, names: Iterable[str]) -> None:
    """Raise SavedModelError if weights of a loaded model did not come from its files.

    Args:
        model: a model that transformers has loaded. It marks each tensor that it has read, and those tied to them.
        names: names in `model.state_dict()` of the tensors that must have been read.
    """
    values = model.state_dict(keep_vars=True)
    missing = [n for n in names if not values[n].is_meta and not getattr(values[n], "_is_hf_initialized", False)]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise SavedModelError(
            f"the folder does not hold the weights its config speaks of: {', '.join(missing[:NAMED])}{more} missing, "
            "which would be random; copy the folder again, or save the model with save_pretrained"
        )


@torch.no_grad()
def refuse_impossible(model: nn.Module) -> None:
    """Raise SavedModelError for weights that no saved model has: of an integer type, NaN or infinite, in no order."""
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and (fault := layer.fault()) is not None:
            raise SavedModelError(f"in {name}, {fault}; the files were changed, copy the folder again")
    for name, value in model.named_parameters():
        if not value.is_meta and not is_finite(value):
            raise SavedModelError(
                f"{name} is {str(value.dtype).removeprefix('torch.')} with values that are NaN or infinite, or of no "
                "floating-point type; copy the folder again"
            )


def _kind_of(dtype: torch.dtype) -> str:
    return "floating point" if dtype.is_floating_point else INTEGERS[dtype]
