"""Code saved with a model, so that it loads without this package by `trust_remote_code=True`."""

import re
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.layers import base, int8, low_rank, pivoted, registry

CARRIED = (base, low_rank, pivoted, int8, registry)
"""Modules that are copied into the folder, with `zssvd_` before their names."""


MODEL = "modeling_zssvd"


CODE = '''"""{model}, with the layers that its config names in compressed form."""

from transformers import {config}, {model}

# all files are named here, since there are releases of transformers that copy no others
from .zssvd_base import CompressedLinear  # noqa: F401
from .zssvd_int8 import EightBitLinear  # noqa: F401
from .zssvd_low_rank import LowRankLinear  # noqa: F401
from .zssvd_registry import layer_like
from .zssvd_pivoted import PivotedLinear  # noqa: F401


class Compressed{config}({config}):
    model_type = "zssvd"


class Compressed{model}({model}):
    config_class = Compressed{config}

    def __init__(self, config):
        super().__init__(config)
        config.quantization_config.pop("files", None)  # digests are of what was read, not of what will be saved
        for name, spec in config.quantization_config["layers"].items():
            parent, _, leaf = name.rpartition(".")
            owner = self.get_submodule(parent)
            old = getattr(owner, leaf)
            setattr(owner, leaf, layer_like(old, spec).to_empty(device=old.weight.device))
        self.post_init()
'''


AUTOMATIC: tuple[Any, ...] = (  # in the order in which they are tried
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModel,
)


def carry_code(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the code of a compressed model into its folder and return the `auto_map` that refers to it.

    Args:
        model: compressed model of transformers.
        folder: folder of the saved model.

    Raises:
        SavedModelError: a layer is of a class outside this package, whose code is not copied.
    """
    carried = {module.__name__ for module in CARRIED}
    for name, layer in model.named_modules():
        if isinstance(layer, base.CompressedLinear) and type(layer).__module__ not in carried:
            raise SavedModelError(
                f"{name} is a {type(layer).__name__} of {type(layer).__module__}, whose code a self-contained folder "
                "does not carry; save with self_contained=False"
            )
    architecture, config = type(model).__name__, type(model.config).__name__
    for module in CARRIED:
        path = Path(str(module.__file__))
        text = re.sub(
            r"^from zssvd_lightning\.layers\.", "from .zssvd_", path.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        (folder / f"zssvd_{path.name}").write_text(text, encoding="utf-8")
    code = CODE.format(model=architecture, config=config)
    (folder / f"{MODEL}.py").write_text(code, encoding="utf-8")
    automatic = next((auto for auto in AUTOMATIC if made_by(auto, model.config) is type(model)), AutoModel)
    return {
        "AutoConfig": f"{MODEL}.Compressed{config}",
        automatic.__name__: f"{MODEL}.Compressed{architecture}",
    }


def made_by(automatic: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that a transformers auto class would build from a config; None if there is none."""
    mapping = automatic._model_mapping  # noqa: SLF001
    found: Any = mapping.get(type(config), None)
    made: type[PreTrainedModel] | None = found[0] if isinstance(found, tuple) else found
    return made
