"""Progress of Low-Rank Prehab in a fit: first second moments, then gradients of the regularizer.

`callbacks/prehab.py` calls the methods at the right moments; `regularizers.py` defines the regularizers.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning._contexts import uncompiled
from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.hooks import Observation
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.calibration.reach import Unreached, named
from zssvd_lightning.distributed import LayerSet, Team
from zssvd_lightning.errors import CalibrationError, CheckpointError, NonFiniteError, NotRegularizedWarning
from zssvd_lightning.model.targets import Target
from zssvd_lightning.prehab.regularizers import Regularizer
from zssvd_lightning.whitening.cholesky import warn_of_jitter
from zssvd_lightning.whitening.moments import Moments


@dataclass
class PrehabRun:
    """State of Low-Rank Prehab in one fit."""

    targets: dict[str, Target] = field(default_factory=dict)
    """Layers that are regularized; empty before and after training, and once a compression has begun."""
    gathering: StatisticsCollector | None = None
    """Collector of the second moments; None once enough batches were seen."""
    saved_gathering: dict[str, Any] | None = None
    """State of the collector before and after training."""
    _team: Team = field(default_factory=Team)
    window: Moments | None = None
    """Second moments of the latest batch, until they are absorbed."""
    begins_at: int | None = None
    """Global step of the first gradient."""
    leaders: dict[str, str] = field(default_factory=dict)
    """Layer -> the layer under whose name their shared second moment is stored."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Leader -> the matrix (n, n) that the regularizer needs of the second moment, in float32 or wider."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> u (m,) of the latest step."""
    left_out: list[str] = field(default_factory=list)
    """Layers that the first batches have not reached."""
    vectors_before: dict[str, Tensor] = field(default_factory=dict)
    """`vectors` at the start of the latest batch."""

    @property
    def batches(self) -> int:
        """Number of batches in the second moments so far."""
        if self.gathering is not None:
            return self.gathering.moments.batches
        return 0 if self.saved_gathering is None else int(self.saved_gathering["moments"]["batches"])

    def attach(self, model: nn.Module, targets: dict[str, Target], team: Team) -> None:
        """Start on the layers of a model, or continue from a checkpoint.

        Args:
            model: the model in training.
            targets: the layers to regularize, by name.
            team: the processes of the run.

        Raises:
            CheckpointError: the checkpoint was saved with other layers.
        """
        if self.begins_at is not None and not self.kept:
            return  # a compression has already begun
        known = set(self.saved_gathering["moments"]["leaders"] if self.saved_gathering else self.leaders)
        targets = {name: target for name, target in targets.items() if name not in self.left_out}
        other = known - targets.keys() if self.begins_at is None else known ^ targets.keys()
        if other:
            raise CheckpointError(
                f"the checkpoint is of a LowRankPrehab of other layers: {len(other)} are trained only then or only "
                f"now ({', '.join(sorted(other)[:3])}); freeze the same layers, or leave the callback out"
            )
        self.targets, self._team = targets, team
        if self.begins_at is None:
            self.gathering = StatisticsCollector(model, LayerSet(targets, team))
            if self.saved_gathering is not None:
                self.gathering.load_state_dict(self.saved_gathering)
                self.saved_gathering = None
        for tensors in (self.kept, self.vectors):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(targets[name].weight.device)

    def watching(self, mask: TokenMask) -> AbstractContextManager[None]:
        """Return a context that takes the second moments of a batch; `absorb` adds them to the statistics.

        Args:
            mask: mask of the batch.

        Raises:
            CalibrationError: the batch is all padding, or layers stop sharing an input.
        """
        if self.gathering is None:
            raise RuntimeError("second moments are gathered once")
        self.window = Moments(leaders=self.gathering.moments.leaders)
        return _watching_inputs(self.gathering.model, self.targets, self.window, mask)

    def absorb(self) -> None:
        """Add the second moments of a finished batch to the statistics."""
        if self.window is not None and self.gathering is not None:
            self.gathering.moments.absorb_moments(self.window)
            self.gathering.moments.batches += 1
        self.window = None

    def begin(self, regularizer: Regularizer, step: int) -> None:
        """Sum the second moments over all processes and store the matrices that R needs. Collective.

        Layers that no batch has reached on any process are left out, with a NotRegularizedWarning.

        Args:
            regularizer: the regularizer R.
            step: global step of the first gradient.

        Raises:
            CalibrationError: no layer ran, or layers share an input on one process and not on another.
            NonFiniteError: an activation was NaN or infinite.
            NotPositiveDefiniteError: a second moment has no Cholesky factor, where R needs one.
        """
        if self.gathering is None:
            raise RuntimeError("second moments are gathered once")
        self.gathering.complete()
        moments, jitters = self.gathering.moments, {}
        self._leave_out([name for name in self.targets if not moments.tokens.get(moments.leaders.get(name, name))])
        for name, target in self.targets.items():
            if moments.leaders.get(name, name) == name:
                kept, jitters[name] = regularizer.kept(self.gathering.second_moment(name), name)
                self.kept[name] = kept.to(target.weight.device, accumulated(target.weight.dtype))
                moments.input_sums.pop(name, None)
        warn_of_jitter(jitters)
        self.leaders = {name: leader for name, leader in moments.leaders.items() if name in self.targets}
        self.begins_at, self.gathering = step, None

    def _leave_out(self, names: list[str]) -> None:
        """Drop layers without second moments, and warn on the first process.

        Raises:
            CalibrationError: no layer has them.
        """
        if not names:
            return
        reasons = named(dict.fromkeys(names, Unreached.NEVER_RAN))
        if len(names) == len(self.targets):
            raise CalibrationError(f"the first batches have reached none of the {len(names)} layers. {reasons}")
        if self._team.rank == 0:
            warnings.warn(
                f"LowRankPrehab leaves out {len(names)} of {len(self.targets)} layers, because its first batches have "
                f"not reached them. {reasons}; or raise moment_batches, or add them to ignore",
                NotRegularizedWarning,
                stacklevel=2,
            )
        self.left_out = names
        self.targets = {name: target for name, target in self.targets.items() if name not in names}

    @property
    def gradients_are_finite(self) -> bool:
        """True if the gradients of the layers are finite."""
        gradients = [target.gradient for target in self.targets.values()]
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    @torch.no_grad()
    def add_gradients(self, regularizer: Regularizer, weight: float) -> float:
        """Add the gradient of `weight * mean_l R(W_l L_l)` to the gradients of the layers, one layer at a time.

        A layer that was frozen after the start of the fit has no gradient and gets none.

        Args:
            regularizer: the regularizer R.
            weight: weight of the regularizer in the loss.

        Returns:
            The value `mean_l R(W_l L_l)`.

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
        """Drop the layers and everything computed from them."""
        self.targets, self.gathering, self.saved_gathering, self.window = {}, None, None, None
        self.kept, self.vectors, self.vectors_before = {}, {}, {}

    def detach(self) -> None:
        """Drop the layers, but not the state for checkpoints. Collective."""
        if self.gathering is not None:
            self.saved_gathering, self.gathering = self.gathering.state_dict(), None
        self.targets, self.window = {}, None

    def state_dict(self, over: bool) -> dict[str, Any]:
        """Return the state between two batches, as plain types and tensors. Collective.

        Args:
            over: whether the latest batch is finished and will not run again.
        """
        return {
            "begins_at": self.begins_at,
            "gathering": self.saved_gathering if self.gathering is None else self.gathering.state_dict(),
            "leaders": dict(self.leaders),
            "left_out": list(self.left_out),
            "kept": dict(self.kept),
            "vectors": dict(self.vectors if over else self.vectors_before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; call it before `attach`."""
        self.begins_at, self.saved_gathering = state["begins_at"], state["gathering"]
        self.leaders, self.kept, self.vectors = (dict(state[name]) for name in ("leaders", "kept", "vectors"))
        self.left_out = list(state.get("left_out", ()))


@contextmanager
def _watching_inputs(
    model: nn.Module, targets: Mapping[str, Target], moments: Moments, mask: TokenMask
) -> Iterator[None]:
    """Add the inputs of the layers to the second moments, in the current mode of the model; remove all hooks on exit.

    Args:
        model: the model that the batch runs through.
        targets: the layers to watch, by name.
        moments: receives the second moments.
        mask: mask of the batch.

    Raises:
        CalibrationError: the batch is all padding, or layers stop sharing an input.
    """
    observation = Observation(model, targets, moments, mask)
    with ExitStack() as stack:
        stack.callback(observation.forward_done)
        stack.enter_context(uncompiled())
        observation.watch_masks()
        observation.watch_inputs()
        yield
