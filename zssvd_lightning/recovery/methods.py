"""The ways to train a low-rank model after factorization: by what, and of which parameters.

Each is a class of settings; `METHODS` has them by name, for YAML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.errors import ConfigError, RecoveryError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.adapters import NAME, Adapter, merged
from zssvd_lightning.recovery.settings import BOTH_AT_ONCE, Recovery

ONE_BY_ONE = [("up",), ("down",)]
"""SVD-LLM's order (arXiv 2403.07378)."""


INSIDE = {"down": ("down", "pivots"), "up": ("up", "others", "bias")}
"""What a layer has for a factor: pivot rows read the input as `down` does, and the rest makes the output."""


ELSEWHERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "modules_to_save": "also_train",
    "bias": "also_train",
    "trainable_token_indices": "also_train",
    "target_parameters": "targets",
}
"""Options of `peft.LoraConfig` that are settings of their own here."""


NEED_BATCHES = ("eva", "corda", "lora_ga", "loftq")
"""Initializations that peft takes from batches, gradients or a quantized model, none of which it is given here."""


@dataclass(frozen=True)
class FactorRecovery(Recovery):
    """Trains the factors themselves, or pivot rows and coefficients, and the biases of their layers.

    The two sides of each component begin with equal norms: Adam takes steps of one size, and `L^-1` has made rows of
    `down` that are much larger than the columns of `up` they meet. Pivot rows and coefficients are taken as they are.
    """

    method = "factors"
    rescales = True

    two_step: bool = False
    """Train `up` for the first half of the recovery, and then `down`; of pivoted layers, coefficients and then rows."""

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """See `Recovery`."""
        return ONE_BY_ONE if self.two_step else BOTH_AT_ONCE

    @torch.no_grad()
    def prepare(self, layer: Factored) -> None:
        """See `Recovery`."""
        if isinstance(layer, PivotedLinear):
            return
        up, down = layer.up.weight, layer.down.weight
        shift = (down.float().norm(dim=1) / up.float().norm(dim=0)).sqrt()
        shift = torch.where(shift.isfinite() & (shift > 0), shift, torch.ones_like(shift))
        up.mul_(shift.to(up.dtype))
        down.div_(shift.to(down.dtype)[:, None])

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """See `Recovery`."""
        return any(parameter.split(".", maxsplit=1)[0] in INSIDE[part] for part in parts)


@dataclass(frozen=True)
class LoRARecovery(Recovery):
    """Trains LoRA (arXiv 2106.09685) on the factors, through peft.

    Merged, a factor is of the same shape as before, so that the layer has the same rank.
    """

    method = "lora"

    rank: int = 8
    """r of LoRA, below the rank of every layer it goes on."""
    alpha: float | None = None
    """What the product of LoRA's two matrices is scaled by, over `rank`; twice the rank when None."""
    clip_rank: bool = False
    """Whether LoRA gets a lower rank where that of a layer is not above it, instead of an error."""
    dropout: float = 0.0
    """Of LoRA's inputs."""
    two_step: bool = False
    """SVD-LLM's order: LoRA on `up` for the first half of the recovery, merged, and then on `down`."""
    merge: bool = True
    """Whether LoRA is merged at the end of the fit; else it stays, to be saved beside the compressed model."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Other options of `peft.LoraConfig`: `use_dora`, `use_rslora`, `init_lora_weights` (`pissa`, `olora`,
    `orthogonal`, ...), `rank_pattern`, `alpha_pattern`, `exclude_modules`, `layers_to_transform`, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "recovery.rank", self.rank, "1 or more")
        require(self.alpha is None or self.alpha > 0, "recovery.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "recovery.dropout", self.dropout, "in [0, 1)")
        for option, instead in ELSEWHERE.items():
            if option in self.peft:
                raise ConfigError(f"recovery.peft has {option!r}; set recovery.{instead} instead")
        init = self.peft.get("init_lora_weights")
        if init in NEED_BATCHES:
            raise ConfigError(
                f"recovery.peft.init_lora_weights is {init!r}, which takes batches, gradients or a quantized model of "
                "its own, while factors are in the basis of their inputs already; there are true, gaussian, pissa, "
                "pissa_niter_N, olora and orthogonal"
            )
        for parts in self.stages:
            self._try(parts)

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """See `Recovery`."""
        return ONE_BY_ONE if self.two_step else BOTH_AT_ONCE

    @property
    def merges(self) -> bool:
        """See `Recovery`."""
        return self.merge

    def adapter(self, parts: Sequence[str], rank: int | None = None) -> Adapter | None:
        """See `Recovery`."""
        r = self.rank if rank is None or not self.clip_rank else min(self.rank, rank - 1)
        if r < 1:
            return None
        own = {
            "r": r,
            "lora_alpha": 2 * r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(parts),
        }
        return Adapter("LORA", own | dict(self.peft), self.seed)

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """See `Recovery`."""
        return "lora_" in parameter

    def _try(self, parts: Sequence[str]) -> None:
        """Raises ConfigError for options that peft cannot put on a layer, or cannot merge."""
        adapter, name = self.adapter(parts), "model.layers.0.q_proj"
        if adapter is None or not adapter.parts_of(name):
            return
        layer = LowRankLinear.from_factors(torch.randn(16, 12), torch.randn(12, 16), None)
        small = Adapter("LORA", {**adapter.options, "r": 2, "rank_pattern": {}}, self.seed)
        try:
            small.attach(name, layer)
            merged(layer, torch.Tensor.detach)
        except RecoveryError as error:
            raise ConfigError(f"recovery.peft is {self.peft}: {error}") from error

    def refuse_rank(self, name: str, layer: LowRankLinear) -> None:
        """Raises RecoveryError where LoRA would have as many dimensions as the layer, or more."""
        for part, factor in (("down", layer.down), ("up", layer.up)):
            rank = getattr(factor, "r", {}).get(NAME, 0)
            if rank >= layer.rank:
                raise RecoveryError(
                    f"LoRA of rank {rank} on {name}.{part} {tuple(factor.weight.shape)} is not below the layer's rank "
                    f"{layer.rank}; lower recovery.rank, set recovery.clip_rank, leave the layer out with "
                    "recovery.targets, raise min_rank_fraction, or train the factors themselves (method 'factors')"
                )


@dataclass(frozen=True)
class SingularValueRecovery(Recovery):
    """Trains one number a component, by which its singular value is multiplied (after SVFit, arXiv 2409.05926).

    That is what (IA)^3 of peft does to the output of `down`; singular vectors stand still.
    """

    method = "singular_values"

    merge: bool = True
    """Whether the numbers are merged at the end of the fit; else they stay, to be saved beside the compressed model."""

    @property
    def merges(self) -> bool:
        """See `Recovery`."""
        return self.merge

    def adapter(self, parts: Sequence[str], rank: int | None = None) -> Adapter | None:
        """See `Recovery`."""
        return Adapter("IA3", {"target_modules": ["down"], "feedforward_modules": []}, self.seed)

    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """See `Recovery`."""
        return "ia3_" in parameter


METHODS: dict[str, type[Recovery]] = {
    kind.method: kind for kind in (LoRARecovery, FactorRecovery, SingularValueRecovery)
}


def recovery_of(settings: Recovery | Mapping[str, Any] | None) -> Recovery | None:
    """The recovery that settings describe.

    Args:
        settings: one of the classes of this file, or a mapping with its `method` and its fields, as YAML has it.

    Raises:
        ConfigError: there is no such method, a key is unknown, or a value is out of range.
    """
    if settings is None or isinstance(settings, Recovery):
        return settings
    given = dict(settings)
    method = given.pop("method", None)
    if method is None:
        raise ConfigError(f"recovery has no method; there are {', '.join(METHODS)}")
    require_one_of("recovery.method", str(method), METHODS)
    return load_config(METHODS[str(method)], None, (), given)
