"""Linear layer of a serving engine, made of one or several saved layers that may be compressed differently.

Engines multiply by the weights of queries, keys and values at once, and split the rows or columns of a weight over
processes. Shapes: W (m, n).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zssvd_lightning.errors import SavedModelError, UnsupportedServingError
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, PivotForm
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.registry import KINDS

Spec = Mapping[str, Any]
"""Kind and sizes of a compressed layer, as in a saved config."""


class Part(NamedTuple):
    """Saved layer, and the share of it that this process holds."""

    name: str
    """Name of the saved layer."""
    spec: Spec | None
    """Kind and sizes of the layer; None if it is dense."""
    saved: tuple[int, int]
    """Shape (m, n) of the whole layer."""
    held: tuple[int, int]
    """Shape (m, n) of the share: fewer rows, fewer columns, or the whole layer."""
    turn: int = 0
    """Index of the share, from 0."""


class FusedLinear(nn.Module):
    """Linear layer `y = [W1; W2; ...] x`: the concatenated outputs of its parts. The engine adds the biases.

    Args:
        parts: the saved layers, in the order of their outputs.
        dtype: floating-point type of all tensors that are not stored in 8 bits.

    Raises:
        UnsupportedServingError: a part is of a kind that cannot be split into such shares.
    """

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = parts
        for name, spec, saved, held, _ in parts:
            if spec and not _has_share(spec["kind"], saved, held):
                raise UnsupportedServingError(
                    f"{name} is of kind {spec['kind']}, which cannot be dealt out to processes; serve it on one"
                )
        self.shapes = [_shapes(_layer(part.spec, part.saved, dtype, bias=True)) for part in parts]
        layers = [_layer(part.spec, part.held, dtype, bias=False) for part in parts]
        self._turned: set[int] = set()
        self._square: list[tuple[int, str, Tensor]] = []
        self.missing = {(index, name) for index, layer in enumerate(layers) for name in _shapes(layer)}
        self.layers = nn.ModuleList(layer.to_empty(device=torch.get_default_device()) for layer in layers)
        self.requires_grad_(requires_grad=False)

    @property
    def names(self) -> list[str]:
        """Names of the saved tensors of all parts, including biases, without duplicates."""
        return list(dict.fromkeys(name for shapes in self.shapes for name in shapes))

    @torch.no_grad()
    def load(self, index: int, name: str, saved: Tensor) -> None:
        """Load this process's share of a saved tensor.

        Engines transpose the weights of `Conv1D` and so also its factors; the shape shows whether a tensor is
        transposed. Factors are never square, but the coefficients of pivoted layers may be. Their square tensors are
        therefore placed in `check`, once the pivots have shown the orientation.

        Args:
            index: index of the part.
            name: name of the tensor within the saved layer.
            saved: the whole saved tensor.

        Raises:
            SavedModelError: the part has no such tensor, or the tensor has another shape.
        """
        part, shape = self.parts[index], self.shapes[index].get(name)
        turned = saved.shape != shape and saved.ndim == 2
        whole = saved.t() if turned else saved
        if shape is None or whole.shape != shape:
            raise SavedModelError(
                f"{part.name}.{name} is {tuple(saved.shape)} in the folder and {shape} by its config; save it again"
            )
        if turned:
            self._turned.add(index)
        if part.spec and issubclass(KINDS[part.spec["kind"]], PivotForm) and shape[:1] == shape[1:]:
            self._square.append((index, name, saved.clone()))
        else:
            self._place(index, name, whole)

    def check(self) -> None:
        """Place the remaining tensors; raise SavedModelError if any tensor was not loaded."""
        while self._square:
            index, name, saved = self._square.pop()
            self._place(index, name, saved.t() if index in self._turned else saved)
        if self.missing:
            names = sorted(f"{self.parts[index].name}.{name}" for index, name in self.missing)
            raise SavedModelError(f"{len(names)} tensors are not in the folder, {names[0]} among them; save it again")

    @torch.no_grad()
    def _place(self, index: int, name: str, whole: Tensor) -> None:
        part, place = self.parts[index], self.layers[index].state_dict()[name]
        for dim, size in enumerate(place.shape):
            if size < whole.shape[dim]:
                whole = whole.narrow(dim, part.turn * size, size)
        place.copy_(whole)
        self.missing.discard((index, name))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m), where m is the sum over all parts."""
        outputs = [layer(x) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def names_of(layer: str, specs: Mapping[str, Spec], packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the saved layers that form a layer of an engine.

    Args:
        layer: name of the layer in the engine.
        specs: kind and sizes of all compressed layers, by name.
        packed: last component of a fused layer's name -> last components of the names of the layers it fuses.
    """
    parent, dot, leaf = layer.rpartition(".")
    return [layer] if layer in specs else [f"{parent}{dot}{name}" for name in packed.get(leaf, [leaf])]


def _has_share(kind: str, saved: tuple[int, int], held: tuple[int, int]) -> bool:
    """Return True if a layer of this kind can have a share of this shape."""
    if kind == Int8LowRankLinear.kind:
        return saved == held
    if kind == ColumnPivotedLinear.kind:
        return saved[1] == held[1]  # a share of the columns would need all pivot columns
    return kind != PivotedLinear.kind or saved[0] == held[0]


def _layer(spec: Spec | None, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool) -> nn.Module:
    """Return a dense or compressed layer on the meta device, without values."""
    (m, n), sizes = shape, dict(spec or {})
    kind: Any = KINDS[sizes.pop("kind")] if sizes else nn.Linear
    layer: nn.Module = kind(n, m, bias=bias, device="meta", dtype=dtype, **sizes)
    return layer


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in layer.state_dict().items()}
