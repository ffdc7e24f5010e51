"""Coverage of a model by its targets: which share of the parameters can be compressed, and what is left alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from rich.table import Table
from torch import nn

from zssvd_lightning.layers.apart.experts import is_stacked
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.model.apart.attention import ATTENTION
from zssvd_lightning.model.apart.convolutions import CONVOLUTION, CONVOLUTIONS
from zssvd_lightning.model.apart.recurrent import RECURRENCES
from zssvd_lightning.model.heads import LINEAR
from zssvd_lightning.model.replace import inside_compressed
from zssvd_lightning.model.targets import CLASSIFICATION_HEAD, INSIDE_ATTENTION, OUTPUT_EMBEDDING, Target, refusals

COMPRESSED = "layers that are compressed already"

KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (CompressedLinear, COMPRESSED),
    (nn.Embedding, "embedding tables"),
    (CONVOLUTION, "convolutions"),
    (nn.RNNBase, "weights of recurrent layers"),
)
"""Types of modules with weights that are not compressed, and what a report calls these weights."""

OTHERS = ((CONVOLUTION, CONVOLUTIONS), (nn.RNNBase, RECURRENCES))
"""Classes of modules with the kinds that they are of."""

HEADS = {OUTPUT_EMBEDDING: "output embeddings", CLASSIFICATION_HEAD: "classification heads"}
"""What a report calls layers that are left alone for these reasons."""

BY_CHOICE = "linear layers excluded by include or ignore"
"""Name in reports of what could be a target if the user had not chosen otherwise, experts and attentions included."""

HALF = 0.5
"""Share of the model below which what can be compressed deserves a warning."""


class LeftAlone(NamedTuple):
    """Parameters that a compression does not touch, for one reason."""

    what: str
    """Kind of the parameters, with the reason if their layers could have been targets."""
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """Share of a model that its targets cover."""

    layers: int
    """Number of targets."""
    parameters: int
    """Parameters of the targets' weights, before the compression."""
    model_parameters: int
    """Parameters of the whole model."""
    left_alone: tuple[LeftAlone, ...]
    """All other parameters, the most first."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        targets: Mapping[str, Target],
        others: Mapping[str, str] | None = None,
        present: Mapping[str, int] | None = None,
    ) -> Self:
        """Return the coverage of a model.

        Args:
            model: any module.
            targets: its layers to compress.
            others: linear layers, and modules that could not be taken apart, that are not compressed for
                another reason than those of `find_targets`, by name.
            present: number of parameters to count for the weight of a layer that is dense only for now, by name.
        """
        refused, sizes = refusals(model) | dict(others or {}), present or {}
        inside = inside_compressed(model)
        seen = {id(target.module.weight) for target in targets.values()}
        groups: dict[str, list[int]] = {}
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    size = sizes.get(name, parameter.numel()) if key == "weight" else parameter.numel()
                    kind = COMPRESSED if id(module) in inside else _kind(name, module, parameter, refused)
                    groups.setdefault(kind, []).append(size)
        left = sorted(
            (LeftAlone(what, len(n), sum(n)) for what, n in groups.items()), key=lambda part: -part.parameters
        )
        covered = sum(sizes.get(name, target.module.weight.numel()) for name, target in targets.items())
        return cls(len(targets), covered, covered + sum(part.parameters for part in left), tuple(left))

    @property
    def share(self) -> float:
        """Share of the model's parameters in the targets, in (0, 1]."""
        return self.parameters / self.model_parameters

    def summary(self, removed: float | None) -> str:
        """Return one line on what is compressed.

        Args:
            removed: fraction of the targets' parameters that will be removed; None if it is not known.
        """
        means = "" if removed is None else f": removing {removed:.1%} of them removes {removed * self.share:.1%} of it"
        return (
            f"compressing {self.layers} layers with {self.parameters:,} of the model's {self.model_parameters:,} "
            f"parameters ({self.share:.1%}){means}; left alone: {self._most_of_the_rest()}"
        )

    def warning(self, removed: float | None) -> str | None:
        """Return a warning if less than half of the model could be compressed, else None; `removed` as in `summary`."""
        by_choice = sum(part.parameters for part in self.left_alone if part.what == BY_CHOICE)
        if (self.parameters + by_choice) / self.model_parameters >= HALF:
            return None
        left = (
            ""
            if removed is None
            else f", so that removing {removed:.1%} of these leaves {1 - removed * self.share:.1%}"
        )
        return (
            f"only {self.share:.1%} of the model's parameters are in layers that can be compressed{left}; left alone: "
            f"{self._most_of_the_rest()}"
        )

    def _most_of_the_rest(self) -> str:
        parts = [f"{part.what} {part.parameters / self.model_parameters:.1%}" for part in self.left_alone]
        return ", ".join([*parts[:3], *(["..."] if len(parts) > 3 else [])]) or "nothing"

    def table(self) -> Table:
        """Return a table of the targets and of all that is left alone, with shares of the model."""
        table = Table(title="what is compressed")
        for column, justify in (("", "left"), ("tensors", "right"), ("parameters", "right"), ("of the model", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        rows = [LeftAlone("weights to compress", self.layers, self.parameters), *self.left_alone]
        for row in rows:
            share = f"{row.parameters / self.model_parameters:.1%}"
            table.add_row(row.what, f"{row.tensors:,}", f"{row.parameters:,}", share, end_section=row is rows[0])
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for `report.json`."""
        return asdict(self) | {"left_alone": [part._asdict() for part in self.left_alone]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return the coverage that `to_dict` wrote. Raises KeyError or TypeError if it is damaged."""
        return cls(**{**saved, "left_alone": tuple(LeftAlone(**part) for part in saved["left_alone"])})


def _kind(name: str, module: nn.Module, parameter: nn.Parameter, refused: Mapping[str, str]) -> str:
    """Return what a report calls a parameter that is in no target."""
    stacked = is_stacked(module)
    if parameter.ndim < 2 + stacked:
        return "biases, norms and other vectors"
    attention = isinstance(module, nn.MultiheadAttention)
    if refused.get(name) == INSIDE_ATTENTION:
        name, attention = name.rpartition(".")[0], True
    if name in refused:
        what = ATTENTION.what if attention else "stacked experts" if stacked else "linear layers"
        what = next((kind.what for class_, kind in OTHERS if isinstance(module, class_)), what)
        return HEADS.get(refused[name], f"{what}: {refused[name]}")
    if stacked or attention or isinstance(module, LINEAR):
        return BY_CHOICE
    for type_, what in KINDS:
        if isinstance(module, type_):
            return what
    if parameter.ndim == 3:
        return "stacked matrices, such as those of experts"
    return f"other weights of {type(module).__name__}"
