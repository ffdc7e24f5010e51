"""Loading of a compressed model from its folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zssvd_lightning._numerics import DTYPES
from zssvd_lightning.errors import ConfigError, SavedModelError
from zssvd_lightning.hub.remote_code import AUTOMATIC, made_by
from zssvd_lightning.serialization.specs import specs_of

WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
"""Options of transformers that locate a config and do not affect the model."""


def from_pretrained(folder: str | Path, dtype: str | torch.dtype | None = "auto", **options: Any) -> PreTrainedModel:
    """Load a compressed or dense model that `save_pretrained` wrote, with the class it was saved from.

    Args:
        folder: a local folder, or a hub id.
        dtype: floating-point type of the weights, such as `float32`; `auto` or None for the type they were saved in.
        options: other options of transformers' `from_pretrained`, such as `device_map="auto"`.

    Raises:
        SavedModelError: files are damaged, or weights are missing, unexpected or of the wrong shape, so that the model
            would be partly random.
        ConfigError: `dtype` is not a type of torch.

    Example:
        >>> model = from_pretrained("mine", device_map="auto")  # doctest: +SKIP
    """
    wanted = _type(options.pop("torch_dtype", dtype))
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True} | options
    try:
        loader = _loader(str(folder), {key: value for key, value in options.items() if key in WHERE})
        loaded: Any = loader.from_pretrained(str(folder), dtype=wanted, **settings)
    except SavedModelError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        if not Path(folder).is_dir():
            raise
        raise SavedModelError(f"{folder} cannot be loaded: {error}") from error
    model, info = loaded
    checked: PreTrainedModel = model
    suspect = ["missing_keys", "mismatched_keys", *(["unexpected_keys"] if specs_of(checked) else [])]
    wrong = {key: info[key] for key in suspect if info[key]}
    if wrong:
        raise SavedModelError(f"{folder} does not hold the weights its config speaks of: {wrong}")
    return checked


def _loader(folder: str, where: dict[str, Any]) -> Any:
    """Return the transformers auto class that builds the saved model; AutoModelForCausalLM if none matches."""
    config = AutoConfig.from_pretrained(folder, **where)
    saved = (config.architectures or [None])[0]
    named = (automatic for automatic in AUTOMATIC if getattr(made_by(automatic, config), "__name__", None) == saved)
    return next(named, AutoModelForCausalLM)


def _type(name: str | torch.dtype | None) -> str | torch.dtype:
    if name is None or name == "auto":
        return "auto"
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype is {name!r}; there are {', '.join(DTYPES)}, and auto")
    return found
