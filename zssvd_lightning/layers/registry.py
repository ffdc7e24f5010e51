"""Registry of the forms of a linear layer, and conversion of a layer into any of them.

Shapes: W (m, n). Needs nothing but torch and transformers, so that a saved folder can carry it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.layers.apart.removed import RemovedLinear
from zssvd_lightning.layers.base import CompressedLinear, Dense, shape_of, take_after, type_of
from zssvd_lightning.layers.int8 import Int8Linear, Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.narrow import NarrowLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

Factored = LowRankLinear | PivotedLinear | ColumnPivotedLinear
"""Layers whose factors can be trained."""


KINDS: dict[str, type[CompressedLinear]] = {
    cls.kind: cls
    for cls in (
        *(LowRankLinear, PivotedLinear, ColumnPivotedLinear, Int8LowRankLinear, Int8Linear),
        *(RemovedLinear, NarrowLinear),
    )
}
"""Layer classes by the name in saved configs."""


def trained_form(kind: str) -> type[Factored]:
    """Return the layer class of a kind that holds trainable factors. Raises TypeError for other kinds."""
    form = KINDS[kind]
    if not issubclass(form, Factored):
        raise TypeError(f"{form.__name__} holds no factors that can be trained")
    return form


def form_for(kind: str, m: int, n: int) -> type[Factored]:
    """Return the layer class for a matrix (m, n) in a storage whose layers are of this kind.

    Kind `pivoted` stands for both sides. Pivot columns are taken if the inputs are not more than the outputs, since
    putting them in order is then the cheaper gather; else pivot rows, which put the outputs in order.
    """
    return ColumnPivotedLinear if kind == PivotedLinear.kind and n <= m else trained_form(kind)


def possible_forms(kind: str, m: int, n: int) -> tuple[type[Factored], ...]:
    """Return the classes that a layer may get, that of `form_for` first.

    Where the order of a hidden width is free, the layers that meet in it hold pivots on that side.
    """
    first, sides = form_for(kind, m, n), (PivotedLinear, ColumnPivotedLinear)
    return (first, *(form for form in sides if kind == PivotedLinear.kind and form is not first))


def layer_like(old: Dense | CompressedLinear, spec: Mapping[str, Any]) -> CompressedLinear:
    """Return a layer on the meta device to replace `old`, of the kind and sizes in `spec`."""
    return KINDS[spec["kind"]].like(old, **{key: value for key, value in spec.items() if key != "kind"})


def dense_like(layer: CompressedLinear) -> Dense:
    """Return a dense layer on the meta device, of the type that `layer` replaced."""
    m, n = shape_of(layer)
    with torch.device("meta"):
        new: Dense = nn.Linear(n, m, layer.bias is not None)
        if layer.transposed:
            new = Conv1D(m, n)  # type: ignore[no-untyped-call]
    new.to(type_of(layer))
    take_after(new, layer)
    return new
