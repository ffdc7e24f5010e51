"""Loading of a compressed model from its folder."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zssvd_lightning._numerics import DTYPES
from zssvd_lightning.errors import ConfigError, SavedModelError
from zssvd_lightning.hub.model_classes import class_named
from zssvd_lightning.serialization.saved_files import refuse_damaged
from zssvd_lightning.serialization.specs import specs_of

logger = logging.getLogger(__name__)

WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
"""Options of transformers that locate a config and do not affect the model."""


def from_pretrained(folder: str | Path, dtype: str | torch.dtype | None = "auto", **options: Any) -> PreTrainedModel:
    """Load a compressed or dense model that `save_pretrained` wrote, with the class it was saved from.

    Args:
        folder: a local folder, or a hub id.
        dtype: floating-point type of the weights, such as `float32`; `auto` or None for the type they were saved in.
        options: other options of transformers' `from_pretrained`, such as `device_map="auto"`.

    Raises:
        SavedModelError: there is no such folder, and no model of the hub can have its name. Or files are damaged, or
            weights are missing, unexpected or of the wrong shape, so that the model would be partly random.
        ConfigError: `dtype` is not a type of torch.

    Example:
        >>> model = from_pretrained("mine", device_map="auto")  # doctest: +SKIP
    """
    wanted = _type(options.pop("torch_dtype", dtype))
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    is_local = Path(folder).is_dir()
    if is_local:
        refuse_damaged(Path(folder) / str(options.get("subfolder", "")))
    else:
        _refuse_no_id(str(folder))
    try:
        config, options = _config(str(folder), options)
        loader = _loader(config)
        loaded: Any = loader.from_pretrained(str(folder), config=config, dtype=wanted, **(settings | options))
    except SavedModelError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        if not is_local:
            raise
        raise SavedModelError(f"{folder} cannot be loaded: {error}") from error
    model, info = loaded
    checked: PreTrainedModel = model
    suspect = ["missing_keys", "mismatched_keys", *(["unexpected_keys"] if specs_of(checked) else [])]
    wrong = {key: info[key] for key in suspect if info[key]}
    if wrong:
        raise SavedModelError(f"{folder} does not hold the weights its config speaks of: {wrong}")
    return checked


def _refuse_no_id(folder: str) -> None:
    """Raise SavedModelError if a name is not that of a model of the hub."""
    try:
        validate_repo_id(folder)
    except HFValidationError as error:
        raise SavedModelError(f"there is no folder {folder}, and no model of the hub can have this name") from error


def _config(folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the config of a folder, changed as the options say, and the options for the model."""
    if options.get("config") is not None:
        return options["config"], {key: value for key, value in options.items() if key != "config"}
    config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    return config, {key: value for key, value in options.items() if key in WHERE} | rest


def _loader(config: PreTrainedConfig) -> Any:
    """Return the class that loads the saved model: the one its config names.

    For code in the folder it is an automatic class, for a name that is unknown AutoModelForCausalLM, with a warning.
    """
    saved = next(iter(config.architectures or ()), None)
    carried = getattr(config, "auto_map", None) or {}
    named = [automatic for automatic, code in carried.items() if str(code).rpartition(".")[2] == saved]
    if named:
        return getattr(transformers, named[0])
    if (found := class_named(saved, config)) is not None:
        return found
    if saved is not None:
        logger.warning("config.json names the class %s, which is unknown here; AutoModelForCausalLM loads it", saved)
    return AutoModelForCausalLM


def _type(name: str | torch.dtype | None) -> str | torch.dtype:
    if name is None or name == "auto":
        return "auto"
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype is {name!r}; there are {', '.join(DTYPES)}, and auto")
    return found
