"""Format of compressed models on disk: transformers files whose config describes the form of every layer.

`AutoModelForCausalLM.from_pretrained(folder)` can load such a folder once `zssvd_lightning` is imported. Without the
import, transformers reports an unknown model type.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.serialization.quantizer import CompressedLayers
from zssvd_lightning.serialization.saved_config import METHOD, telling
from zssvd_lightning.serialization.specs import specs_of


def mark(model: nn.Module) -> None:
    """Record the compressed layers in the configs of all transformers models in `model`.

    The record is then part of the config, however the model is saved. It is removed from the configs of dense models.
    """
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(outer) for outer in seen):
            seen.append(f"{name}." if name else "")
            tell(module.config, specs_of(module))


def tell(config: PreTrainedConfig, specs: Mapping[str, dict[str, Any]]) -> None:
    """Record the compressed layers in one config; remove the record if `specs` is empty.

    Raises:
        SavedModelError: the config already describes another quantization.
    """
    plain = getattr(type(config), "plain", type(config))
    found = getattr(config, "quantization_config", None)
    if specs:
        only_read = isinstance(found, dict) and found.get("quant_method") == METHOD
        if found is not None and not only_read and not isinstance(found, CompressedLayers):
            raise SavedModelError(f"a config can tell of one quantization only, and has {type(found).__name__} already")
        config.quantization_config = CompressedLayers(specs)
        config.__class__ = telling(plain)  # type: ignore[arg-type]
    elif isinstance(found, CompressedLayers):
        del config.quantization_config
        config.__class__ = plain
