"""Settings for training a low-rank model after factorization, common to all methods."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from zssvd_lightning._types import check_types
from zssvd_lightning._validation import closest, require, require_count, require_one_of
from zssvd_lightning.errors import ConfigError, RecoveryError, TargetError
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.layers.registry import Factored, trained_form
from zssvd_lightning.layers.storage import STORAGES
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
"""Learning-rate schedules of transformers that need only their length and the length of their warmup."""


SAY_WHEN = "set max_steps, or max_epochs if the length of the training data is known"


@dataclass(frozen=True)
class Recovery(ABC):
    """Settings common to all methods of recovery. Parameters that the method does not train are frozen."""

    method: ClassVar[str]

    lr: float | None = 1e-3
    """Peak learning rate of AdamW; None keeps the optimizer and schedule of `configure_optimizers`."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    schedule: str = "cosine"
    """Learning-rate schedule, by its name in transformers (`linear`, `cosine`, `constant`, ...)."""
    warmup: float = 0.05
    """Fraction of the recovery during which the learning rate rises to its peak, in [0, 1)."""
    loss: str = "own"
    """Training loss: `own` is the loss of `training_step`; `distill` is the divergence from the dense model's
    predictions; `both` is the weighted sum of the two."""
    distill_weight: float = 0.5
    """Weight of the divergence in `both`, in (0, 1); the other loss gets the rest."""
    temperature: float = 1.0
    """Temperature by which logits are divided before they are compared; its square multiplies the divergence."""
    teacher: str = IN_MEMORY
    """Teacher for distillation: `memory` for a dense copy of the model, or a folder that `save_predictions` wrote."""
    teacher_dtype: str = "bfloat16"
    """Floating-point type of the copy in memory."""
    targets: list[str] | None = None
    """Name patterns of the low-rank layers to train, in the form of `include`; every layer when None."""
    also_train: list[str] = field(default_factory=list)
    """Name patterns of other parameters to train, such as `*norm.weight` or the weights of dense layers."""
    seed: int = 0
    """Seed for initial values."""
    minutes: float | None = None
    """Limit of the training in minutes. The first steps are timed; the number of steps, and with it the schedule,
    follows from them and is logged. The limits of the Trainer apply too. None for these alone."""
    judge_every: int = 25
    """Optimizer steps between two measurements on the `held_out` batches of the callback, if there are any."""
    patience: int | None = 8
    """Number of measurements in a row without a better one after which training stops; None for no limit."""

    def __post_init__(self) -> None:
        check_types(self, "recovery.")
        require(self.lr is None or self.lr > 0, "recovery.lr", self.lr, "above 0, or null")
        require(self.weight_decay >= 0, "recovery.weight_decay", self.weight_decay, "0 or more")
        require_one_of("recovery.schedule", self.schedule, SCHEDULES)
        require(0 <= self.warmup < 1, "recovery.warmup", self.warmup, "in [0, 1)")
        require_one_of("recovery.loss", self.loss, LOSSES)
        require(0 < self.distill_weight < 1, "recovery.distill_weight", self.distill_weight, "strictly between 0 and 1")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "above 0")
        require_one_of("recovery.teacher_dtype", self.teacher_dtype, DTYPES)
        require(self.minutes is None or 0 < self.minutes < inf, "recovery.minutes", self.minutes, "above 0, or null")
        require_count("recovery.judge_every", self.judge_every, 1)
        require(self.patience is None or self.patience >= 1, "recovery.patience", self.patience, "1 or more, or null")

    @property
    def distills(self) -> bool:
        """True if predictions of the dense model are needed."""
        return self.loss != "own"

    @property
    def keeps_teacher(self) -> bool:
        """True if a dense copy of the model in memory is needed."""
        return self.distills and self.teacher == IN_MEMORY

    @property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """Groups of factors that are trained at the same time, stage by stage."""
        return BOTH_AT_ONCE

    @property
    def merges(self) -> bool:
        """True if adapters are merged into the factors at the end."""
        return True

    def adapter(self, parts: Sequence[str], name: str, layer: Factored) -> Adapter | None:
        """Return the adapter for these factors of a layer; None if the layer gets none.

        Args:
            parts: names of factors, from `adapters.PARTS`; `layer.thin_layers` tells which thin layers stand for them.
            name: name of the layer in its model.
            layer: a layer that `targets` chooses, with or without values.

        Raises:
            ConfigError: peft refuses an option.
            RecoveryError: the layer is too small for the adapter.
        """
        return None

    @abstractmethod
    def trains(self, parameter: str, parts: Sequence[str]) -> bool:
        """Return True if a parameter of a chosen layer is trained.

        Args:
            parameter: name of the parameter within the layer.
            parts: names of the factors trained in the current stage.
        """

    @property
    def trains_pivots_as_factors(self) -> bool:
        """True if layers of pivots are trained as two factors of the same rank, and become pivots again at the end."""
        return False

    rescales: ClassVar[bool] = False
    """True if `prepare` changes the scale of components, which `loss_aware` rounding uses as weights."""

    def prepare(self, layer: Factored) -> None:  # noqa: B027  (most methods train an adapter)
        """Bring a chosen layer into the form best suited for training, without changing its function."""

    def chooses(self, name: str) -> bool:
        """Return True if the name of a layer matches `targets`."""
        return self.targets is None or any(matches(name, pattern) for pattern in self.targets)

    needs_components: ClassVar[bool] = False
    """True if the method acts on single components, which pivots do not keep apart."""

    def refuse_storage(self, storage: str) -> None:
        """Raise ConfigError if the method acts on components, and a storage, or a kind of layer, has none."""
        form = STORAGES[storage].layer if storage in STORAGES else storage
        if self.needs_components and issubclass(trained_form(form), PivotForm):
            raise ConfigError(
                f"recovery by {self.method!r} acts on single components, and storage {storage!r} keeps rows or "
                "columns of the weight instead; recover by 'lora' or 'factors', or use storage 'factors'"
            )

    def refuse_layers(self, classes: Mapping[str, Sequence[type[Factored]]]) -> None:
        """Raise TargetError if a pattern of `targets` matches none of the layers.

        Args:
            classes: names of the layers that are compressed, and the possible classes of those that replace them.
        """
        for pattern in self.targets or ():
            if not any(matches(name, pattern) for name in classes):
                raise TargetError(
                    f"recovery.targets has {pattern!r}, which matches no layer that is compressed"
                    + closest(pattern, list(classes))
                )

    def refuse_endless(self) -> None:
        """Raise RecoveryError if the number of steps is unknown, but the schedule or the stages need it."""
        if len(self.stages) > 1:
            raise RecoveryError(f"recovery.two_step has to know when training ends; {SAY_WHEN}")
        if self.lr is not None and self.schedule not in ENDLESS_SCHEDULES:
            raise RecoveryError(
                f"recovery.schedule {self.schedule!r} has to know when training ends, but neither max_steps nor "
                f"max_epochs says so; {SAY_WHEN}, or take {' or '.join(ENDLESS_SCHEDULES)}"
            )

    def reduced(self, layers: Mapping[str, Factored]) -> str | None:
        """Return a warning if some of the chosen layers are trained less than the settings ask for, otherwise None."""
        return None

    def optimizer(self, parameters: Sequence[nn.Parameter], steps: float) -> dict[str, Any]:
        """Return AdamW and its schedule, in the form that `configure_optimizers` returns.

        Args:
            parameters: the trained parameters.
            steps: number of optimizer steps until the schedule ends; infinite if unknown.

        Raises:
            RecoveryError: no steps are left, or the schedule needs to know their number and it is unknown.
        """
        if self.lr is None:
            raise RuntimeError("without a learning rate the module's own optimizer is used")
        if steps < 1:
            raise RecoveryError(f"the recovery has {steps} steps left; raise max_steps or max_epochs")
        if steps == float("inf"):
            self.refuse_endless()
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = self.scheduler(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: float) -> LambdaLR:
        """Return the learning-rate schedule of an optimizer over so many steps; infinite if unknown."""
        from transformers import get_scheduler  # loads peft where it is installed

        length = 0 if steps == float("inf") else int(steps)
        made: LambdaLR = get_scheduler(self.schedule, optimizer, int(self.warmup * length), length)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types, from which `recovery_of` rebuilds them."""
        return {"method": self.method} | asdict(self)
