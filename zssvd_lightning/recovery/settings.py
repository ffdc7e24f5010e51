"""How a low-rank model is trained after factorization: what all `ways` have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import get_scheduler

from zssvd_lightning._validation import closest, require, require_one_of
from zssvd_lightning.errors import ConfigError, RecoveryError, TargetError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.adapters import PARTS, Adapter
from zssvd_lightning.model.targets import matches

LOSSES = ("own", "distill", "both")


IN_MEMORY = "memory"


DTYPES = ("bfloat16", "float16", "float32")


BOTH_AT_ONCE = [PARTS]


SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *(ENDLESS_SCHEDULES := ("constant", "constant_with_warmup")),
)
"""Those of transformers that need to know no more than how long they and their warmup are."""


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
