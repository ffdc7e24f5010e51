"""Compressed models as folders that transformers reads: its usual files, with every rank in the config.

Importing this module registers the format, so that `AutoModelForCausalLM.from_pretrained(folder)` rebuilds the
low-rank layers before it loads the weights.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.structure import ranks_of, rebuild

METHOD = "zssvd"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of a compressed model's config.

    Args:
        ranks: rank of every low-rank layer, by its name in the model.
        version: of this format.
    """

    def __init__(self, ranks: dict[str, int] | None = None, version: int = FORMAT_VERSION, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks = ranks or {}
        self.version = version


@register_quantizer(METHOD)
class LowRankRebuilder(HfQuantizer):
    """Puts empty low-rank layers into the model that transformers is about to load weights into."""

    requires_calibration = True
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.quantization_config.version > FORMAT_VERSION:
            raise SavedModelError(
                f"the folder is of format {self.quantization_config.version}, this release reads {FORMAT_VERSION}; "
                "upgrade zssvd-lightning"
            )
        rebuild(model, self.quantization_config.ranks)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Saving again writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """So that the transformers Trainer fine-tunes them in full."""
        return True


def save_pretrained(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes a compressed (or dense) model, and its tokenizer, as safetensors and config files into `folder`."""
    if ranks := ranks_of(model):
        model.config.quantization_config = LowRankConfig(ranks)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def from_pretrained(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """The causal language model in a folder that `save_pretrained` wrote, compressed or dense.

    Args:
        folder: a local folder, or a hub id.
        dtype: floating-point type of the weights, such as `float32`; as they were saved when `auto`.

    Raises:
        SavedModelError: weights are missing or of the wrong shape, so the model would be partly random, or a
            compressed model has some left over.
    """
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    checked: PreTrainedModel = model
    suspect = ["missing_keys", "mismatched_keys", *(["unexpected_keys"] if ranks_of(checked) else [])]
    wrong = {key: info[key] for key in suspect if info[key]}
    if wrong:
        raise SavedModelError(f"{folder} does not hold the weights its config speaks of: {wrong}")
    return checked
