"""Code saved with a model, so that it loads without this package by `trust_remote_code=True`."""

import re
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.hub.model_classes import automatic_for, saved_class
from zssvd_lightning.layers import base, gradients, int8, low_rank, narrow, pivoted, pivoted_columns, pivots, registry
from zssvd_lightning.layers.apart import (
    attention,
    convolutions,
    experts,
    factors,
    grouped,
    grouped_experts,
    recurrent,
    removed,
    stacks,
)
from zssvd_lightning.serialization.quantizer import FORMAT_VERSION

CARRIED = (
    attention,
    base,
    convolutions,
    experts,
    factors,
    grouped,
    grouped_experts,
    low_rank,
    narrow,
    gradients,
    pivots,
    pivoted,
    pivoted_columns,
    int8,
    recurrent,
    removed,
    registry,
    stacks,
)
"""Modules that are copied into the folder, with `zssvd_` before their names."""


MODEL = "modeling_zssvd"


CODE = '''"""{model}, with the layers that its config names in compressed form."""

from {config_module} import {config}
from {model_module} import {model}

# all files are named here, since there are releases of transformers that copy no others
from .zssvd_attention import project
from .zssvd_base import CompressedLinear
from .zssvd_convolutions import unfold
from .zssvd_experts import take_apart
from .zssvd_factors import factors_of  # noqa: F401
from .zssvd_grouped import unfold_groups
from .zssvd_gradients import permuted  # noqa: F401
from .zssvd_grouped_experts import forward_by_stacks  # noqa: F401
from .zssvd_int8 import EightBitLinear  # noqa: F401
from .zssvd_low_rank import LowRankLinear  # noqa: F401
from .zssvd_narrow import NarrowLinear  # noqa: F401
from .zssvd_recurrent import separate_recurrences
from .zssvd_registry import layer_like
from .zssvd_removed import forget_removed
from .zssvd_pivoted import PivotedLinear  # noqa: F401
from .zssvd_pivoted_columns import ColumnPivotedLinear  # noqa: F401
from .zssvd_pivots import choose_pivots  # noqa: F401
from .zssvd_stacks import Stacks  # noqa: F401


class Compressed{config}({config}):
    model_type = "zssvd"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Keep the record of the layers under another name, since transformers knows no quantization of its name."""
        told = dict(config_dict)
        record = told.pop("quantization_config")
        made = super().from_dict(told, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.compressed_layers = record["layers"]
        return made

    def to_dict(self):
        """Return the entries of `config.json`, without digests, which are of what was read, not of what is saved."""
        told = super().to_dict()
        layers = told.pop("compressed_layers", None)
        if layers is not None:
            told["quantization_config"] = {{"quant_method": "zssvd", "version": {version}, "layers": layers}}
        return told


class Compressed{model}({model}):
    config_class = Compressed{config}

    def __init__(self, config):
        super().__init__(config)
        take_apart(self, config.compressed_layers)
        unfold(self, config.compressed_layers)
        unfold_groups(self, config.compressed_layers)
        project(self, config.compressed_layers)
        separate_recurrences(self, config.compressed_layers)
        for name, spec in config.compressed_layers.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.get_submodule(parent)
            old = getattr(owner, leaf)
            setattr(owner, leaf, layer_like(old, spec).to_empty(device=old.weight.device))
        forget_removed(self)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **options):
        """Load as transformers does, but raise ValueError where weights are missing or cannot be."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)
        wrong = {{key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}}
        for name, layer in model.named_modules():
            if isinstance(layer, CompressedLinear) and (fault := layer.fault()) is not None:
                wrong[name] = fault
        if wrong:
            raise ValueError(f"the folder does not hold the weights its config speaks of: {{wrong}}")
        return (model, info) if output_loading_info else model
'''


def carry_code(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the code of a compressed model into its folder and return the `auto_map` that refers to it.

    Args:
        model: compressed model of transformers.
        folder: folder of the saved model.

    Raises:
        SavedModelError: a layer is of a class outside this package, or the model of one outside transformers, whose
            code is not copied.
    """
    carried = {module.__name__ for module in CARRIED}
    for name, layer in model.named_modules():
        if isinstance(layer, base.CompressedLinear) and type(layer).__module__ not in carried:
            raise SavedModelError(
                f"{name} is a {type(layer).__name__} of {type(layer).__module__}, whose code a self-contained folder "
                "does not carry; save with self_contained=False"
            )
    kind, config_kind = saved_class(model), getattr(type(model.config), "plain", type(model.config))
    if kind is None or not all(part.__module__.startswith("transformers.") for part in (kind, config_kind)):
        raise SavedModelError(
            f"{type(model).__name__} or its config is of a class outside transformers, whose code a self-contained "
            "folder does not carry; save with self_contained=False"
        )
    architecture, config = kind.__name__, config_kind.__name__
    for module in CARRIED:
        path = Path(str(module.__file__))
        text = re.sub(
            r"^from zssvd_lightning\.layers\.(apart\.)?",
            "from .zssvd_",
            path.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        (folder / f"zssvd_{path.name}").write_text(text, encoding="utf-8")
    code = CODE.format(
        model=architecture,
        config=config,
        model_module=_place_of(kind),
        config_module=_place_of(config_kind),
        version=FORMAT_VERSION,
    )
    (folder / f"{MODEL}.py").write_text(code, encoding="utf-8")
    code = f"{MODEL}.Compressed{architecture}"
    return {"AutoConfig": f"{MODEL}.Compressed{config}"} | dict.fromkeys(automatic_for(kind, model.config), code)


def _place_of(kind: type) -> str:
    """Return the module to import a class of transformers from."""
    return "transformers" if getattr(transformers, kind.__name__, None) is kind else kind.__module__
