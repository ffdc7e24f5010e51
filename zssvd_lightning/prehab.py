"""Low-Rank Prehab (arXiv 2512.01980): training towards weights that lose less when they are truncated.

The loss gets a regularizer of the whitened weights, `loss + lambda(t) mean_l R(W_l L_l)`, where R is a differentiable
stand-in for the rank.

Shapes: W (m, n) weight, A (n, n) second moment of the layer's inputs, L (n, n) its Cholesky factor with
`A + eps I = L L^T`.
"""

import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.autograd.function import FunctionCtx

from zssvd_lightning import telemetry
from zssvd_lightning.calibration import Observation, token_mask
from zssvd_lightning.callback import ZSSVDCallback
from zssvd_lightning.config import require
from zssvd_lightning.distributed import Shards, Team
from zssvd_lightning.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from zssvd_lightning.gathering import Gathering
from zssvd_lightning.guards import most_accumulated
from zssvd_lightning.phase import Phase
from zssvd_lightning.statistics import Moments, accumulated, exact_products
from zssvd_lightning.strategies import RefusedAdapter, StrategyAdapter, adapter_for
from zssvd_lightning.targets import Target, find_targets
from zssvd_lightning.training_loss import changed_loss
from zssvd_lightning.whitening import safe_cholesky, warn_of_jitter

logger = logging.getLogger(__name__)

VERSION = 1
FIRST_ITERATIONS = 50
"""Power iterations from a random vector, as many as the paper's code takes at every step."""
NEXT_ITERATIONS = 2
"""Power iterations from the vector of the step before."""
FIRST_FRACTION = 1e-5
"""Of the full weight, at the start of the exponential schedule: the paper's code goes from 1e-4 to 10."""


class Term(NamedTuple):
    """The regularizer of one layer."""

    value: Tensor
    """R, a scalar."""
    gradient: Tensor
    """dR/dW (m, n)."""
    u: Tensor | None
    """(m,) first left singular vector of `W L`, as far as it is known, where the regularizer needs it."""


def stable_rank(W: Tensor, A: Tensor, u: Tensor | None = None) -> Term:
    """`||W L||_F^2 / ||W L||_2^2` with `A = L L^T`, between 1 and min(m, n); 0 for W = 0.

    Neither `W L` nor its decomposition is needed: `||W L||_F^2 = <W, W A>`, and power iterations `u <- W A W^T u` lead
    to `||W L||_2^2 = u^T W A W^T u`. The gradient is that at fixed u, `2 (W A - R u u^T W A) / ||W L||_2^2`, which is
    the true one once u is the first left singular vector. Before that, R is too large but never above min(m, n).

    Args:
        W: weight (m, n).
        A: second moment (n, n) in the type that it is all computed in.
        u: from the step before, (m,); None at first.
    """
    iterations = FIRST_ITERATIONS if u is None else NEXT_ITERATIONS
    u = torch.randn(len(W), generator=torch.Generator().manual_seed(0)).to(W) if u is None else u
    WA = W @ A
    for _ in range(iterations):
        longer = WA @ (W.T @ u)
        length = longer.norm()
        u = torch.where(length > 0, longer / length, u)
    uWA = WA.T @ u
    squared_frobenius = (W * WA).sum()
    least = (squared_frobenius / min(W.shape)).clamp_min(torch.finfo(W.dtype).tiny)
    squared_spectral = torch.maximum(uWA @ (W.T @ u), least)
    value = squared_frobenius / squared_spectral
    gradient = torch.addr(WA, -value * u, uWA).mul_(2 / squared_spectral)
    return Term(value, gradient, u)


def nuclear_norm(W: Tensor, L: Tensor, u: Tensor | None = None) -> Term:
    """`||W L||_*`, the sum of the singular values; its gradient is `U V^T L^T` for `W L = U S V^T`.

    It is not free of scale, as it is not in the paper's code, and takes a whole decomposition of every layer at every
    step.

    Args:
        W: weight (m, n).
        L: Cholesky factor (n, n) in the type that it is all computed in.
        u: not used.
    """
    whitened = W @ L
    if not torch.isfinite(whitened).all():  # which decompositions do not take
        return Term(whitened.new_tensor(math.nan), torch.full_like(W, math.nan), None)
    U, sigma, Vh = torch.linalg.svd(whitened, full_matrices=False)
    return Term(sigma.sum(), (U @ Vh) @ L.T, None)


class Regularizer(NamedTuple):
    """A stand-in for the rank of `W L`."""

    term: Callable[[Tensor, Tensor, Tensor | None], Term]
    """From W, what is kept of L, and the u of the step before."""
    kept: Callable[[Tensor], Tensor]
    """From L to what the term needs of it (n, n)."""
    metric: str
    """What loggers know it by."""


REGULARIZERS = {
    "stable_rank": Regularizer(stable_rank, lambda factor: factor @ factor.T, "stable_rank"),
    "nuclear": Regularizer(nuclear_norm, lambda factor: factor, "nuclear_norm"),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "exponential": lambda done: math.pow(FIRST_FRACTION, 1 - done),
}
"""From the fraction of the steps that are done, in (0, 1], to that of the full weight."""


def mean_term(
    targets: Mapping[str, Target],
    regularizer: Regularizer,
    leaders: Mapping[str, str],
    whitening: Mapping[str, Tensor],
    vectors: dict[str, Tensor],
) -> Tensor:
    """`mean_l R(W_l L_l)`, a scalar that gradients flow from into the weights.

    Args:
        targets: the layers.
        regularizer: R.
        leaders: layer name -> name of the layer that keeps the second moment for it.
        whitening: leader -> what `regularizer.kept` made of L (n, n), in float32 or wider.
        vectors: layer name -> u (m,) from the step before, replaced by the new ones; empty at first.

    Raises:
        NonFiniteError: R is NaN or infinite for a layer.
    """
    values = {}
    for name, target in targets.items():
        W = target.module.weight.T if target.split else target.module.weight
        kept = whitening[leaders[name]]
        with torch.no_grad(), exact_products(), torch.autocast(W.device.type, enabled=False):
            found = regularizer.term(W.to(kept.dtype), kept, vectors.get(name))
        if found.u is not None:
            vectors[name] = found.u
        value: Tensor = _KnownGradient.apply(W, found.value, found.gradient)  # type: ignore[no-untyped-call]
        values[name] = value
    device = next(iter(values.values())).device
    mean = torch.stack([value.to(device) for value in values.values()]).mean()
    if not torch.isfinite(mean):
        name, value = next((name, value) for name, value in values.items() if not torch.isfinite(value))
        raise NonFiniteError(
            f"the {regularizer.metric} of {name} {targets[name].shape} is {value.item()}: its weights hold NaN or are "
            "too large; lower the learning rate or the weight of LowRankPrehab"
        )
    return mean


class LowRankPrehab(L.Callback):
    """Prepares a model for truncation by Low-Rank Prehab (arXiv 2512.01980), in ordinary training before it.

    The second moments of the layers' inputs are taken from the first training batches, which train the model as ever.
    From then on the loss of every batch is `loss + lambda(t) mean_l R(W_l L_l)`: lambda grows for `steps` optimizer
    steps and then stays, until a `ZSSVDCallback` in the same Trainer begins, wherever that is in the list of callbacks,
    or the fit ends. The `start_step` of `ZSSVDCallback` must leave room for it. What the module logs as its loss is
    without the term. A fit that goes on from no checkpoint starts afresh.

    The paper's code trains a change to `W L`, with all else frozen; here the optimizer has W itself and whatever else
    it was given, so that the learning rate acts in other coordinates and a good `weight` is another. There lambda grows
    exponentially from 1e-4 to 10 over 10 steps for the stable rank (BERT), and is always 5 for the nuclear norm (ViT).

    What it takes with the stable rank, beside A (n, n) for every group of layers that share an input, in memory and in
    checkpoints: for every micro-batch the product `W A` of every layer, which is the work of a forward pass over n
    tokens, and memory for one more gradient in float32.

    Args:
        steps: optimizer steps over which lambda grows to `weight`, after those of `moment_batches`.
        weight: lambda in the end.
        schedule: how lambda grows, `linear` or `exponential` (from 1e-5 of `weight`).
        regularizer: R, `stable_rank` (`||W L||_F^2 / ||W L||_2^2`) or `nuclear` (`||W L||_*`, not free of scale).
        moment_batches: training batches the second moments are taken from, with the accumulation window they end in.
        include: name patterns of the layers to regularize, as `ZSSVDCallback` takes them; all linear ones when None.
        ignore: name patterns of layers to leave alone.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedTrainingError: at the start of `fit`, when optimization is manual, the strategy keeps no whole
            weights on a process, all layers are frozen, or a `ZSSVDCallback` would begin too early.
        TargetError: at the start of `fit`, when there is no layer to regularize.
        CheckpointError: at the start of `fit`, when the checkpoint is of a prehab with other settings.
        CalibrationError: during `fit`, when the first batches do not give the second moments.
        NonFiniteError: during `fit`, when the term is NaN or infinite.

    Example:
        >>> callbacks = [LowRankPrehab(steps=200), ZSSVDCallback(0.4, start_step=216)]  # doctest: +SKIP
    """

    def __init__(
        self,
        steps: int = 200,
        *,
        weight: float = 1.0,
        schedule: str = "linear",
        regularizer: str = "stable_rank",
        moment_batches: int = 16,
        include: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        require(steps >= 1, "steps", steps, "1 or more")
        require(0 < weight < math.inf, "weight", weight, "more than 0 and finite")
        require(schedule in SCHEDULES, "schedule", schedule, f"one of {', '.join(SCHEDULES)}")
        require(regularizer in REGULARIZERS, "regularizer", regularizer, f"one of {', '.join(REGULARIZERS)}")
        require(moment_batches >= 1, "moment_batches", moment_batches, "1 or more")
        self.steps = steps
        self.weight = weight
        self.schedule = schedule
        self.regularizer = regularizer
        self.moment_batches = moment_batches
        self.include = [include] if isinstance(include, str) else include
        self.ignore = [ignore] if isinstance(ignore, str) else ignore
        self._borrowed = ExitStack()
        self._observation = ExitStack()
        self._fitting = True
        self._run = _Run()

    def token_mask(self, batch: Any) -> Tensor | None:
        """Which positions (B, T) of a batch are not padding. Override for batches without an `attention_mask`."""
        return token_mask(batch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Has the module's training step add the term, in a fit."""
        self._borrowed.close()
        self._fitting = stage == "fit"
        if self._fitting:
            self._run = _Run(weakref.ref(trainer))
            self._borrowed.enter_context(changed_loss(pl_module, lambda loss, _: self._regularized(trainer, loss)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives back what was borrowed."""
        self._observation.close()
        self._borrowed.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives back what was borrowed."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses runs that the term cannot be added in, before any batch is spent; goes on from a checkpoint."""
        if not _waiting(trainer):
            self._run.release()
            return
        adapter = adapter_for(trainer, pl_module)
        _refuse_unsupported(pl_module, adapter)
        targets = find_targets(pl_module, self.include, self.ignore)
        if not any(target.module.weight.requires_grad for target in targets.values()):
            raise UnsupportedTrainingError(
                f"all {len(targets)} layers to regularize are frozen, so that the term would change nothing; unfreeze "
                "some, or include others"
            )
        self._refuse_early_compression(trainer)
        self._run.attach(pl_module, targets, adapter.team)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the inputs of the batch, or begins to regularize when enough were seen."""
        self._observation.close()
        run = self._run
        run.latest, run.vectors_before = None, dict(run.vectors)
        if run.gathering is None or not _waiting(trainer):
            return
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        if run.gathering.moments.batches >= self.moment_batches and opens_window:
            run.begin(REGULARIZERS[self.regularizer], trainer.global_step)
            return
        run.window = Moments(leaders=run.gathering.moments.leaders)
        self._observation.enter_context(_watching(run.targets, run.window, self.token_mask(batch)))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tells loggers of the term, at the steps Lightning logs at."""
        if self._run.latest is not None and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            weight, value = self._run.latest
            telemetry.log(trainer, **{"prehab_weight": weight, REGULARIZERS[self.regularizer].metric: float(value)})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Adds the inputs of the batch to the second moments."""
        self._observation.close()
        self._run.absorb()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops watching a batch that was skipped."""
        self._observation.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, as they are between two batches at whatever moment it is called. Collective."""
        run = self._run
        if over := run.batch_is_over():
            run.absorb()
        return {
            "version": VERSION,
            "settings": self._settings(),
            "begins_at": run.begins_at,
            "gathering": run.restored if run.gathering is None else run.gathering.state_dict(),
            "leaders": dict(run.leaders),
            "whitening": dict(run.whitening),
            "vectors": dict(run.vectors if over else run.vectors_before),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint, for a fit. Raises CheckpointError when it cannot."""
        if not self._fitting:
            return
        if state_dict.get("version") != VERSION:
            raise CheckpointError(
                f"the checkpoint holds state of LowRankPrehab of version {state_dict.get('version')}, this release "
                f"reads {VERSION}; go on with the release that wrote it"
            )
        mine, saved = self._settings(), state_dict["settings"]
        other = [f"{name} was {saved[name]!r} and is {mine[name]!r}" for name in mine if saved[name] != mine[name]]
        if other:
            raise CheckpointError(
                f"the checkpoint is of a LowRankPrehab with other settings ({'; '.join(other)}); go on with the same, "
                "or leave the callback out"
            )
        run = self._run
        run.begins_at, run.restored, run.leaders = (state_dict[key] for key in ("begins_at", "gathering", "leaders"))
        run.whitening, run.vectors = dict(state_dict["whitening"]), dict(state_dict["vectors"])

    def __getstate__(self) -> dict[str, Any]:
        """What goes along with a copy, or to another process: nothing of the run under way."""
        return self.__dict__ | {"_run": _Run(), "_borrowed": ExitStack(), "_observation": ExitStack()}

    def _settings(self) -> dict[str, Any]:
        names = ("steps", "weight", "schedule", "regularizer", "moment_batches")
        patterns = {"include": self.include, "ignore": self.ignore}
        return {name: getattr(self, name) for name in names} | {
            name: None if given is None else list(given) for name, given in patterns.items()
        }

    def _refuse_early_compression(self, trainer: L.Trainer) -> None:
        """Raises UnsupportedTrainingError when a compression would begin before lambda has grown."""
        compression = _compression(trainer)
        if compression is None:
            return
        accumulate, per_epoch = most_accumulated(trainer), trainer.num_training_batches
        begins_at: float | None = self._run.begins_at
        if begins_at is None:
            seen = 0 if self._run.restored is None else self._run.restored["moments"]["batches"]
            begins_at = trainer.global_step + _steps(max(self.moment_batches - seen, 0), per_epoch, accumulate)
        ends_at = begins_at + self.steps
        epochs = compression.start_epoch and compression.start_epoch * _steps(per_epoch, per_epoch, accumulate)
        starts_at = max(compression.start_step, epochs)
        if starts_at < ends_at:
            raise UnsupportedTrainingError(
                f"ZSSVDCallback would begin at step {starts_at} (start_step={compression.start_step}, "
                f"start_epoch={compression.start_epoch}), but prehab takes until step {ends_at} (second moments until "
                f"{begins_at}, then steps={self.steps}); set start_step={ends_at}, or lower steps or moment_batches"
            )

    def _regularized(self, trainer: L.Trainer, loss: Tensor) -> Tensor:
        """The loss, and the term on top unless it is not the time for it."""
        self._observation.close()  # before the backward pass, in which activation checkpointing runs layers again
        run = self._run
        if not _waiting(trainer):
            if run.gathering is not None or (run.whitening and self._done(trainer, 0) < 1):
                logger.warning("compression has begun before the weight of LowRankPrehab has grown to %s", self.weight)
            run.release()
        if not run.whitening:
            return loss
        value = mean_term(run.targets, REGULARIZERS[self.regularizer], run.leaders, run.whitening, run.vectors)
        weight = self.weight * SCHEDULES[self.schedule](self._done(trainer, 1))
        run.latest = weight, value.detach()
        return loss + weight * value.to(loss.device)

    def _done(self, trainer: L.Trainer, this: int) -> float:
        """Which fraction of the steps is done, with `this` one or (0) without it."""
        begins_at = trainer.global_step if self._run.begins_at is None else self._run.begins_at
        return min((trainer.global_step - begins_at + this) / self.steps, 1.0)


@dataclass
class _Run:
    """What one fit goes by."""

    trainer: weakref.ref[L.Trainer] | None = None
    targets: dict[str, Target] = field(default_factory=dict)
    team: Team = field(default_factory=Team)
    gathering: Gathering | None = None
    """Second moments, until enough batches were seen."""
    restored: dict[str, Any] | None = None
    """Second moments in a checkpoint, until training starts."""
    window: Moments | None = None
    """Second moments of the latest batch, until it is over."""
    begins_at: int | None = None
    """The global step of the first batch with a term."""
    leaders: dict[str, str] = field(default_factory=dict)
    whitening: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    vectors_before: dict[str, Tensor] = field(default_factory=dict)
    """`vectors` at the start of the latest batch."""
    latest: tuple[float, Tensor] | None = None
    """Lambda and the mean of R in the latest batch."""

    def attach(self, model: L.LightningModule, targets: dict[str, Target], team: Team) -> None:
        """Begins on the layers of a model, or goes on from a checkpoint."""
        self.targets, self.team = targets, team
        if self.begins_at is None:
            self.gathering = Gathering(model, targets, team)
            if self.restored is not None:
                self.gathering.load_state_dict(self.restored)
                self.restored = None
        for tensors in (self.whitening, self.vectors):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(targets[name].module.weight.device)

    def release(self) -> None:
        """Frees what is not needed any more once a compression has begun."""
        self.gathering = self.restored = self.window = None
        self.whitening, self.vectors, self.vectors_before = {}, {}, {}

    def absorb(self) -> None:
        """Adds what a batch that is over has given to the second moments."""
        if self.window is not None and self.gathering is not None:
            self.gathering.moments.absorb_inputs(self.window)
            self.gathering.moments.batches += 1
        self.window = None

    def begin(self, regularizer: Regularizer, step: int) -> None:
        """Brings the second moments of all processes together, and keeps of them what R needs. Collective.

        Raises:
            CalibrationError: a layer never ran, or its inputs do not give a second moment.
        """
        if self.gathering is None:
            raise RuntimeError("second moments are gathered once")
        self.gathering.share_counts()
        moments, jitters = self.gathering.moments, {}
        for name, target in self.targets.items():
            if moments.leaders.get(name, name) == name:
                own, n, weight = moments.input_sums.pop(name, None), target.shape[1], target.module.weight
                if own is None:
                    own = torch.zeros(n, n, dtype=accumulated(weight.dtype), device=weight.device)
                whole = Moments({name: name}, {name: self.team.over_batches(own)}, {name: moments.tokens.get(name, 0)})
                factor, jitters[name] = safe_cholesky(whole.second_moment(name), name)
                self.whitening[name] = regularizer.kept(factor).to(weight.device, accumulated(weight.dtype))
        warn_of_jitter(jitters)
        self.leaders, self.begins_at = dict(moments.leaders), step
        self.gathering = self.restored = None

    def batch_is_over(self) -> bool:
        """Whether Lightning would not run the latest batch again."""
        trainer = self.trainer() if self.trainer is not None else None
        if trainer is None:
            return True
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed == progress.ready)


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: FunctionCtx, W: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = W.dtype  # type: ignore[attr-defined]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (scale * gradient).to(ctx.dtype), None, None


@contextmanager
def _watching(targets: dict[str, Target], moments: Moments, mask: Tensor | None) -> Iterator[None]:
    """Adds the inputs of the layers to the second moments, in whatever mode the model is in."""
    observation = Observation(targets, moments, mask)
    with ExitStack() as stack:
        stack.callback(observation.forward_done)
        if "torch._dynamo" in sys.modules:  # compiled code would not run the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        observation.watch_inputs()
        yield


def _refuse_unsupported(pl_module: L.LightningModule, adapter: StrategyAdapter) -> None:
    if not pl_module.automatic_optimization:
        raise UnsupportedTrainingError(
            f"{type(pl_module).__name__} optimizes manually, so that its loss cannot be changed from outside; set "
            "automatic_optimization = True"
        )
    if isinstance(adapter, RefusedAdapter) or isinstance(adapter.team, Shards):
        raise UnsupportedTrainingError(
            f"under {type(adapter.trainer.strategy).__name__} no process has whole weights, which prehab needs; run it "
            "in a first fit on one device or with strategy='ddp', and compress in a second one"
        )


def _compression(trainer: L.Trainer) -> ZSSVDCallback | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ZSSVDCallback)), None)


def _waiting(trainer: L.Trainer) -> bool:
    """Whether no compression has begun."""
    compression = _compression(trainer)
    return compression is None or compression.phase is Phase.WAIT


def _steps(batches: float, batches_per_epoch: float, accumulate: int) -> float:
    """Optimizer steps in so many batches from the start of an epoch, whose last step may take fewer batches."""
    if math.isinf(batches_per_epoch):
        return batches if math.isinf(batches) else math.ceil(batches / accumulate)
    epochs, rest = divmod(batches, batches_per_epoch)
    return int(epochs * math.ceil(batches_per_epoch / accumulate) + math.ceil(rest / accumulate))
