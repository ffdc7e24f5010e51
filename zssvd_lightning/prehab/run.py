"""How far Low-Rank Prehab has come in a fit: second moments at first, then the gradients of the regularizer.

When things happen is in `prehab.py`, what the regularizers are in `regularizers.py`.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.hooks import watching_inputs
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CheckpointError, NonFiniteError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.prehab.regularizers import Regularizer
from zssvd_lightning.whitening.cholesky import warn_of_jitter
from zssvd_lightning.whitening.moments import Moments


@dataclass
class PrehabRun:
    """What one fit goes by."""

    targets: dict[str, Target] = field(default_factory=dict)
    """The layers; none before training, after it, and once a compression has begun."""
    gathering: StatisticsCollector | None = None
    """Second moments, until enough batches were seen."""
    saved_gathering: dict[str, Any] | None = None
    """Its `state_dict`, before training and after it."""
    window: Moments | None = None
    """Second moments of the latest batch, until it is over."""
    begins_at: int | None = None
    """The global step of the first gradient."""
    leaders: dict[str, str] = field(default_factory=dict)
    """Layer -> the layer that keeps the second moment for it."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Leader -> what the regularizer needs of the second moment (n, n), in float32 or wider."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> u (m,) of the latest step."""
    vectors_before: dict[str, Tensor] = field(default_factory=dict)
    """`vectors` at the start of the latest batch."""

    @property
    def batches(self) -> int:
        """How many batches the second moments are of so far."""
        if self.gathering is not None:
            return self.gathering.moments.batches
        return 0 if self.saved_gathering is None else int(self.saved_gathering["moments"]["batches"])

    def attach(self, model: nn.Module, targets: dict[str, Target], team: Team) -> None:
        """Begins on the layers of a model, or goes on from a checkpoint.

        Raises:
            CheckpointError: the checkpoint is of other layers.
        """
        if self.begins_at is not None and not self.kept:
            return  # a compression had begun
        known = set(self.saved_gathering["moments"]["leaders"] if self.saved_gathering else self.leaders)
        other = known - targets.keys() if self.begins_at is None else known ^ targets.keys()
        if other:
            raise CheckpointError(
                f"the checkpoint is of a LowRankPrehab of other layers: {len(other)} are trained only then or only "
                f"now ({', '.join(sorted(other)[:3])}); freeze the same layers, or leave the callback out"
            )
        self.targets = targets
        if self.begins_at is None:
            self.gathering = StatisticsCollector(model, targets, team)
            if self.saved_gathering is not None:
                self.gathering.load_state_dict(self.saved_gathering)
                self.saved_gathering = None
        for tensors in (self.kept, self.vectors):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(targets[name].weight.device)

    def watching(self, mask: Tensor | None) -> AbstractContextManager[None]:
        """Takes the second moments of a batch, which count once it is absorbed.

        Args:
            mask: positions (B, T) that are not padding, or None.

        Raises:
            CalibrationError: the batch is all padding, or layers stop sharing an input.
        """
        if self.gathering is None:
            raise RuntimeError("second moments are gathered once")
        self.window = Moments(leaders=self.gathering.moments.leaders)
        return watching_inputs(self.targets, self.window, mask)

    def absorb(self) -> None:
        """Adds what a batch that has run has given to the second moments."""
        if self.window is not None and self.gathering is not None:
            self.gathering.moments.absorb_moments(self.window)
            self.gathering.moments.batches += 1
        self.window = None

    def begin(self, regularizer: Regularizer, step: int) -> None:
        """Brings the second moments of all processes together, and keeps of them what R needs. Collective.

        Args:
            regularizer: R.
            step: the global step of the first gradient.

        Raises:
            CalibrationError: a layer never ran, or layers share an input on one process and not on another.
            NonFiniteError: an activation was NaN or infinite.
            NotPositiveDefiniteError: a second moment has no Cholesky factor, where R needs one.
        """
        if self.gathering is None:
            raise RuntimeError("second moments are gathered once")
        self.gathering.complete()
        moments, jitters = self.gathering.moments, {}
        for name, target in self.targets.items():
            if moments.leaders.get(name, name) == name:
                kept, jitters[name] = regularizer.kept(self.gathering.second_moment(name), name)
                self.kept[name] = kept.to(target.weight.device, accumulated(target.weight.dtype))
                moments.input_sums.pop(name, None)
        warn_of_jitter(jitters)
        self.leaders, self.begins_at, self.gathering = dict(moments.leaders), step, None

    @property
    def gradients_are_finite(self) -> bool:
        """Whether what autograd left on the layers is finite."""
        gradients = [target.gradient for target in self.targets.values()]
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    @torch.no_grad()
    def add_gradients(self, regularizer: Regularizer, weight: float) -> float:
        """Adds the gradient of `weight * mean_l R(W_l L_l)` to those of the layers, one layer after the other.

        A layer that has been frozen since the start of the fit, and so has no gradient, gets none.

        Returns:
            `mean_l R(W_l L_l)`.

        Raises:
            NonFiniteError: R is NaN or infinite for a layer.
        """
        values: list[Tensor] = []
        of_each = weight / len(self.targets)
        for name, target in self.targets.items():
            kept = self.kept[self.leaders[name]]
            with exact_products():
                value, gradient, u = regularizer.term(target.weight.to(kept.dtype), kept, self.vectors.get(name))
            values.append(value.to(values[0].device) if values else value)
            if u is not None:
                self.vectors[name] = u
            if target.gradient is not None:
                target.gradient.add_(gradient, alpha=of_each)
            elif target.module.weight.requires_grad:
                target.leave_gradient(gradient.mul_(of_each))
        found = dict(zip(self.targets, torch.stack(values).tolist(), strict=True))
        for name, of_layer in found.items():
            if not math.isfinite(of_layer):
                raise NonFiniteError(
                    f"the {regularizer.metric} of {name} {self.targets[name].shape} is {of_layer}: its weights hold "
                    "NaN or are too large; lower the learning rate or the weight of LowRankPrehab"
                )
        return math.fsum(found.values()) / len(found)

    def release(self) -> None:
        """Drops the layers, and all that was taken of them."""
        self.targets, self.gathering, self.saved_gathering, self.window = {}, None, None, None
        self.kept, self.vectors, self.vectors_before = {}, {}, {}

    def detach(self) -> None:
        """Drops the layers, but not what a checkpoint holds. Collective."""
        if self.gathering is not None:
            self.saved_gathering, self.gathering = self.gathering.state_dict(), None
        self.targets, self.window = {}, None

    def state_dict(self, over: bool) -> dict[str, Any]:
        """Plain types and tensors, as they are between two batches. Collective.

        Args:
            over: whether the latest batch will not be run again.
        """
        return {
            "begins_at": self.begins_at,
            "gathering": self.saved_gathering if self.gathering is None else self.gathering.state_dict(),
            "leaders": dict(self.leaders),
            "kept": dict(self.kept),
            "vectors": dict(self.vectors if over else self.vectors_before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a `state_dict`, before `attach`."""
        self.begins_at, self.saved_gathering = state["begins_at"], state["gathering"]
        self.leaders, self.kept, self.vectors = (dict(state[name]) for name in ("leaders", "kept", "vectors"))
