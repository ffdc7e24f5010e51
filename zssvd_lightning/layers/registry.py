"""Registry of the forms of a linear layer, and conversion of a layer into any of them.

Shapes: W (m, n). Needs nothing but torch and transformers, so that a saved folder can carry it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.layers.base import CompressedLinear, Dense, shape_of, take_after, type_of
from zssvd_lightning.layers.int8 import Int8Linear, Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear

Factored = LowRankLinear | PivotedLinear
"""Forms of a truncated weight in which it can be trained."""


KINDS: dict[str, type[CompressedLinear]] = {
    cls.kind: cls for cls in (LowRankLinear, PivotedLinear, Int8LowRankLinear, Int8Linear)
}
"""The forms there are, by the name that saved configs give them."""


def trained_form(kind: str) -> type[LowRankLinear] | type[PivotedLinear]:
    """The form of that kind, to put a truncated weight into."""
    form = KINDS[kind]
    if not issubclass(form, Factored):
        raise TypeError(f"factors cannot be trained as {form.__name__}, which is no {Factored}")
    return form


def layer_like(old: Dense | CompressedLinear, spec: Mapping[str, Any]) -> CompressedLinear:
    """A layer on the meta device for the place of `old`, of the kind and the sizes that `spec` tells."""
    return KINDS[spec["kind"]].like(old, **{key: value for key, value in spec.items() if key != "kind"})


def dense_like(layer: CompressedLinear) -> Dense:
    """The kind of dense layer that `layer` replaced, on the meta device, for its place."""
    m, n = shape_of(layer)
    with torch.device("meta"):
        new: Dense = nn.Linear(n, m, layer.bias is not None)
        if layer.transposed:
            new = Conv1D(m, n)  # type: ignore[no-untyped-call]
    new.to(type_of(layer))
    take_after(new, layer)
    return new
