"""How a low-rank model is trained after factorisation: by what, of which parameters, at which rate, towards what.

Each way is a class of settings; `METHODS` has them by name, for YAML.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import get_scheduler

from zssvd_lightning.adapters import NAME, PARTS, Adapter, merged
from zssvd_lightning.errors import ConfigError, RecoveryError, TargetError
from zssvd_lightning.forms import Factored
from zssvd_lightning.modules import LowRankLinear
from zssvd_lightning.pivoted import PivotedLinear
from zssvd_lightning.settings import closest, load_config, require, require_one_of
from zssvd_lightning.targets import matches

LOSSES = ("own", "distill", "both")
IN_MEMORY = "memory"
DTYPES = ("bfloat16", "float16", "float32")
BOTH_AT_ONCE = [PARTS]
ONE_BY_ONE = [("up",), ("down",)]
"""SVD-LLM's order (arXiv 2403.07378)."""
INSIDE = {"down": ("down", "pivots"), "up": ("up", "others", "bias")}
"""What a layer has for a factor: pivot rows read the input as `down` does, and the rest makes the output."""
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *(ENDLESS_SCHEDULES := ("constant", "constant_with_warmup")),
)
"""Those of transformers that need to know no more than how long they and their warmup are."""

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
"""Initialisations that peft takes from batches, gradients or a quantised model, none of which it is given here."""


@dataclass(frozen=True)
class Recovery(ABC):
    """What the ways to recover have in common. Everything else of the model stands still meanwhile."""

    method: ClassVar[str]

    lr: float | None = 1e-3
    """Highest learning rate, of AdamW; None keeps the optimizer and schedule of `configure_optimizers`."""
    weight_decay: float = 0.0
    """Of AdamW."""
    schedule: str = "cosine"
    """Of the learning rate over the recovery, by its name in transformers (`linear`, `cosine`, `constant`, ...)."""
    warmup: float = 0.05
    """Fraction of the recovery over which the rate rises to its highest, in [0, 1)."""
    loss: str = "own"
    """`own` is what `training_step` returns; `distill` is the divergence from the dense model's predictions in its
    place; `both` adds them, weighted."""
    distill_weight: float = 0.5
    """Share of the divergence in `both`, in (0, 1)."""
    temperature: float = 1.0
    """By which logits are divided before they are compared; the divergence is multiplied by its square."""
    teacher: str = IN_MEMORY
    """`memory` keeps a dense copy of the model; else a folder of its likeliest tokens, as `save_predictions` writes."""
    teacher_dtype: str = "bfloat16"
    """Floating-point type of the copy in memory."""
    targets: list[str] | None = None
    """Name patterns of the low-rank layers to train, in the form of `include`; all when None."""
    also_train: list[str] = field(default_factory=list)
    """Name patterns of other parameters to train as they are, such as `*norm.weight` or those of dense layers."""
    seed: int = 0
    """Of initial values."""

    def __post_init__(self) -> None:
        for patterns in ("targets", "also_train"):
            if isinstance(given := getattr(self, patterns), str):
                object.__setattr__(self, patterns, [given])
        require(self.lr is None or self.lr > 0, "recovery.lr", self.lr, "above 0, or null")
        require(self.weight_decay >= 0, "recovery.weight_decay", self.weight_decay, "0 or more")
        require_one_of("recovery.schedule", self.schedule, SCHEDULES)
        require(0 <= self.warmup < 1, "recovery.warmup", self.warmup, "in [0, 1)")
        require_one_of("recovery.loss", self.loss, LOSSES)
        require(0 < self.distill_weight < 1, "recovery.distill_weight", self.distill_weight, "strictly between 0 and 1")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "above 0")
        require_one_of("recovery.teacher_dtype", self.teacher_dtype, DTYPES)

    @property
    def distills(self) -> bool:
        """Whether predictions of the dense model are needed."""
        return self.loss != "own"

    @property
    def keeps_teacher(self) -> bool:
        """Whether a dense copy of the model is."""
        return self.distills and self.teacher == IN_MEMORY

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """The factors trained at the same time, stage by stage."""
        return BOTH_AT_ONCE

    @property
    def merges(self) -> bool:
        """Whether what is added is merged into the factors at the end."""
        return True

    def adapter(self, parts: Sequence[str], rank: int | None = None) -> Adapter | None:
        """What is put on these factors of a layer; None where they are trained themselves.

        Args:
            parts: of `adapters.PARTS`.
            rank: of the layer; any when None.

        Raises:
            ConfigError: peft refuses an option.
        """
        return None

    @abstractmethod
    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """Whether a parameter of a chosen layer, by its name in there, is trained."""

    rescales: ClassVar[bool] = False
    """Whether `prepare` changes the scale of components, by which `loss_aware` rounding weighs them."""

    def prepare(self, layer: Factored) -> None:  # noqa: B027  (most ways train what they add)
        """Brings a chosen layer into the form it is trained best in; what it computes stays the same."""

    def chooses(self, name: str) -> bool:
        """Whether a layer is one of `targets`."""
        return self.targets is None or any(matches(name, pattern) for pattern in self.targets)

    def refuse_storage(self, storage: str) -> None:
        """Raises ConfigError for a storage that has no two factors, where something is to be put on them."""
        if storage == PivotedLinear.kind and self.adapter(PARTS) is not None:
            raise ConfigError(
                f"recovery by {self.method!r} is put on the two factors of a layer, and storage {storage!r} has none; "
                "recover by 'factors', which trains pivot rows and coefficients, or keep storage 'factors'"
            )

    def refuse_layers(self, names: Sequence[str]) -> None:
        """Raises TargetError when a pattern of `targets` is of none of the layers, and so nothing would be trained."""
        for pattern in self.targets or ():
            if not any(matches(name, pattern) for name in names):
                raise TargetError(
                    f"recovery.targets has {pattern!r}, which matches no layer that is compressed"
                    + closest(pattern, names)
                )

    def refuse_rank(self, name: str, layer: LowRankLinear) -> None:  # noqa: B027  (most ways suit every rank)
        """Raises RecoveryError for a layer of too low a rank."""

    def optimizer(self, parameters: Sequence[nn.Parameter], steps: float) -> dict[str, Any]:
        """AdamW and its schedule, in the form `configure_optimizers` returns.

        Args:
            parameters: what is trained.
            steps: optimizer steps until the schedule ends.

        Raises:
            RecoveryError: the training has no end that the schedule could go by.
        """
        if self.lr is None:
            raise RuntimeError("without a learning rate the module's own optimizer is used")
        if steps < 1:
            raise RecoveryError(f"the recovery has {steps} steps left; raise max_steps or max_epochs")
        if steps == float("inf") and self.schedule not in ENDLESS_SCHEDULES:
            raise RecoveryError(
                f"recovery.schedule {self.schedule!r} has to know when training ends, but neither max_steps nor "
                f"max_epochs says so; set one, or take {' or '.join(ENDLESS_SCHEDULES)}"
            )
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        length = 0 if steps == float("inf") else int(steps)
        schedule = get_scheduler(self.schedule, optimizer, int(self.warmup * length), length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def to_dict(self) -> dict[str, Any]:
        """Plain types, from which `recovery_of` makes the same."""
        return {"method": self.method} | asdict(self)


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
                f"recovery.peft.init_lora_weights is {init!r}, which takes batches, gradients or a quantised model of "
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
