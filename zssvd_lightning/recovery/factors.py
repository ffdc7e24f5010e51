"""Method `factors`: training of the numbers that low-rank layers hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zssvd_lightning._validation import require_one_of
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.recovery.settings import BOTH_AT_ONCE, Recovery

FORMS = ("stored", "factors")


ONE_BY_ONE = [("up",), ("down",)]
"""Training order of SVD-LLM (arXiv 2403.07378): first `up`, then `down`."""


INSIDE = {"down": ("down", "pivots", "mixing"), "up": ("up", "others", "columns", "bias")}
"""Parameters of a layer that belong to each factor.

Pivot rows and the coefficients of columns read the input, as `down` does; all other parameters produce the output.
"""


@dataclass(frozen=True)
class FactorRecovery(Recovery):
    """Recovery that trains the factors, or pivots and coefficients, and the biases of their layers.

    The factors are first rescaled so that both sides of each component have equal norms. This suits Adam, whose steps
    have one size: `L^-1` makes the rows of `down` much larger than the matching columns of `up`. Pivots and
    coefficients are not rescaled.
    """

    method = "factors"
    rescales = True

    form: str = "stored"
    """Form in which layers of storage `pivoted` train: `stored`, as pivots and coefficients, or `factors`, as two
    balanced factors of the same rank, which become pivots and coefficients again when training ends."""
    two_step: bool = False
    """True to train `up` for the first half of the recovery, then `down`; in pivoted layers what stands for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("recovery.form", self.form, FORMS)

    @property
    def trains_pivots_as_factors(self) -> bool:
        """True if layers of pivots train as two factors."""
        return self.form == "factors"

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """Groups of factors that are trained at the same time, stage by stage."""
        return ONE_BY_ONE if self.two_step else BOTH_AT_ONCE

    @torch.no_grad()
    def prepare(self, layer: Factored) -> None:
        """Rescale the factors of a chosen layer so that both sides of each component have equal norms."""
        if isinstance(layer, PivotForm):
            return
        up, down = layer.up.weight, layer.down.weight
        shift = (down.float().norm(dim=1) / up.float().norm(dim=0)).sqrt()
        shift = torch.where(shift.isfinite() & (shift > 0), shift, torch.ones_like(shift))
        up.mul_(shift.to(up.dtype))
        down.div_(shift.to(down.dtype)[:, None])

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """Return True if a parameter of a chosen layer, named within the layer, belongs to one of the factors."""
        return any(parameter.split(".", maxsplit=1)[0] in INSIDE[part] for part in parts)
