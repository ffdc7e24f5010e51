"""The steps of the method on one model, each callable on its own: what the callback and the pipeline share.

Weights are edited in place by `truncate` and `correct`; modules are replaced once, by `factorise`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zssvd_lightning.budget import Budget, Shape
from zssvd_lightning.calibration import Observation, checked_loss, collect_gradients, observing
from zssvd_lightning.config import CompressionConfig
from zssvd_lightning.correction import best_fraction, projected_step
from zssvd_lightning.decomposition import decompose
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.factorization import Factors, install, truncated_weight
from zssvd_lightning.phase import Phase
from zssvd_lightning.plan import Plan
from zssvd_lightning.report import LayerReport, Report, Stopwatch
from zssvd_lightning.selection import RULES, Selection
from zssvd_lightning.spectrum import Spectrum
from zssvd_lightning.statistics import Moments, exact_products
from zssvd_lightning.targets import find_targets, replace_module, weights_snapshot

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """Statistics over some batches, and what is done with them."""

    gathers: Phase
    """CALIBRATE (second moments and gradients) or CORRECT (gradients)."""
    act: Callable[["Compression"], None]


def steps(config: CompressionConfig) -> list[Step]:
    """The course of a compression, up to its factorisation."""
    correction = [Step(Phase.CORRECT, Compression.correct)]
    if config.line_search:
        correction.append(Step(Phase.CORRECT, Compression.shorten_step))
    truncation = Step(Phase.CALIBRATE, Compression.truncate)
    return [truncation] + [*correction, truncation] * config.corrections


class Compression:
    """One model on its way to low rank.

    Args:
        model: any module with linear layers.
        config: what to remove and how.
        progress: whether to draw a bar over the long steps.

    Attributes:
        may_discard: whether gradients may be discarded, which takes memory for a second set of second moments.

    Raises:
        TargetError: there is nothing to compress, or something that cannot be.
        BudgetError: the rank floor makes the prune ratio impossible.
        PlanError: the plan to follow cannot be read or is of another model.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, progress: bool = True) -> None:
        self.model = model
        self.config = config
        self.targets = find_targets(model, config.include, config.ignore)
        self.budget = Budget(
            {n: t.shape for n, t in self.targets.items()}, config.prune_ratio, config.min_rank_fraction
        )
        self._plan = None if config.plan is None else Plan.read(config.plan, self.budget)
        self.moments = Moments()
        self._window = Moments()
        self.may_discard = False
        self._model_parameters = sum(p.numel() for p in model.parameters())
        self.stopwatch = Stopwatch()
        self.progress = progress
        self.losses: list[float] = []
        self.fractions: list[float] = []
        self._step: tuple[float, float] | None = None
        self._pending: list[tuple[float, float]] = []
        self._originals: dict[str, Tensor] | None = None
        self._selection: Selection | None = None
        self._factors: dict[str, Factors] = {}
        self._installed: dict[str, nn.Module] = {}

    @contextmanager
    def observing(self, mask: Tensor | None, inputs: bool = True) -> Iterator[Observation]:
        """One batch under observation; see `calibration.observing`."""
        moments = self.moments
        if self.may_discard:
            moments = self._window
            moments.leaders |= self.moments.leaders
        with observing(self.model, self.targets, moments, mask, inputs) as observation:
            yield observation

    @property
    def pending(self) -> bool:
        """Whether losses wait for their gradients."""
        return bool(self._pending)

    def add_loss(self, loss: Tensor, terms: float) -> None:
        """Notes a batch's mean loss until its gradient comes. Raises CalibrationError or NonFiniteError."""
        self._pending.append((checked_loss(loss).item(), terms))

    def collect_gradients(self, weight: float) -> None:
        """Adds the losses noted and `weight` times the gradients on the targets to the statistics, and clears both."""
        self.moments.absorb_inputs(self._window)
        for loss, terms in self._pending:
            self.moments.add_loss(loss, terms)
        self._pending = []
        collect_gradients(self.targets, self.moments, weight)

    def discard_gradients(self) -> None:
        """Forgets the losses noted, the gradients on the targets and, with `may_discard`, the inputs seen with them."""
        self._pending = []
        self._window = Moments()
        for target in self.targets.values():
            target.module.weight.grad = None

    @torch.no_grad()
    def truncate(self) -> None:
        """Spectra, selection and truncation in place, from the statistics gathered since the last step.

        Raises:
            CalibrationError: the statistics are missing, not finite or degenerate; the message names the layer.
        """
        spectra, selection = self._select()
        with self.stopwatch("truncate"):
            if self._originals is None:
                self._originals = weights_snapshot(self.targets)
            self._factors = {}
            for name, kept in selection.kept.items():
                target = self.targets[name]
                if kept is None:
                    target.assign(self._originals[name])
                else:
                    self._factors[name] = Factors(*spectra[name].factors(kept)).to(target.weight)
                    target.assign(truncated_weight(self._factors[name]))
        self._selection = selection
        self._start_afresh()
        logger.info(
            "truncated %d of %d layers, predicted drift %.4g",
            len(self._factors),
            len(self.targets),
            selection.predicted_drift,
        )

    @torch.no_grad()
    def correct(self) -> None:
        """One projected gradient step at the truncated weights, per matrix, against the kept original weights.

        Raises:
            CalibrationError: a gradient is missing, zero or not finite.
        """
        if self._originals is None:
            raise RuntimeError("correct() needs a truncate() before it")
        with self.stopwatch("correct"):
            gradients = {name: self.moments.mean_gradient(name) for name in self.targets}
            slope = 0.0
            for name, target in self.targets.items():
                W = target.weight.to(torch.promote_types(target.weight.dtype, torch.float32))
                stepped = projected_step(W, self._originals[name], gradients[name])
                slope += float((gradients[name] * (stepped - W)).sum())
                target.assign(stepped)
            self._step = (self.moments.mean_loss, slope)
            self.fractions.append(1.0)
        self._start_afresh()

    @torch.no_grad()
    def shorten_step(self) -> None:
        """Goes back along the last step to where the loss is estimated to be least, from the loss at its end."""
        if self._step is None:
            raise RuntimeError("shorten_step() needs a correct() before it")
        with self.stopwatch("correct"):
            fraction = best_fraction(*self._step, self.moments.mean_loss)
            for name, factors in self._factors.items():
                target = self.targets[name]
                target.assign(torch.lerp(truncated_weight(factors), target.weight, fraction))
            self._step = None
            self.fractions[-1] = fraction
        self._start_afresh()

    def plan(self) -> Plan:
        """The ranks that `truncate` would choose now, from the same statistics; nothing changes.

        Raises:
            CalibrationError: see `truncate`.
        """
        _, selection = self._select()
        return Plan.of(selection, self.budget)

    def factorise(self) -> None:
        """Replaces every truncated layer by a `LowRankLinear`."""
        with self.stopwatch("factorise"):
            self._installed = install(self.model, self.targets, self._factors)

    def restore(self) -> None:
        """Undoes everything: the dense layers and their original weights are back where they were."""
        for name, module in self._installed.items():
            replace_module(self.model, module, self.targets[name].module)
        if self._originals is not None:
            with torch.no_grad():
                for name, target in self.targets.items():
                    target.assign(self._originals[name])
        self._originals, self._selection, self._factors, self._installed = None, None, {}, {}
        self.moments = Moments()

    def report(self) -> Report:
        """What was done, so far as the compression itself knows it."""
        if self._selection is None:
            raise RuntimeError("report() needs a truncate() before it")
        ranks = {name: self._selection.rank(name) for name in self.targets}
        layers = {name: LayerReport(rank, self.budget.shapes[name]) for name, rank in ranks.items()}
        return Report(
            asked=self.config.prune_ratio if self._plan is None else self._plan.reached,
            parameters_before=self.budget.total,
            parameters_after=self.budget.kept(ranks),
            model_parameters_before=self._model_parameters,
            layers=layers,
            predicted_drift=self._selection.predicted_drift,
            losses=list(self.losses),
            correction_fractions=list(self.fractions),
            seconds=dict(self.stopwatch.seconds),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything up to the next `truncate`, as plain types and tensors, from which `load_state_dict` goes on.

        Weights are not in it: they are the model's.
        """
        return {
            "config": asdict(self.config),
            "shapes": {name: list(shape) for name, shape in self.budget.shapes.items()},
            "model_parameters": self._model_parameters,
            "moments": self.moments.state_dict(),
            "window": self._window.state_dict(),
            "pending": [list(entry) for entry in self._pending],
            "gradients": self._open_gradients(),
            "originals": self._originals,
            "factors": {name: list(factors) for name, factors in self._factors.items()},
            "step": None if self._step is None else list(self._step),
            "losses": list(self.losses),
            "fractions": list(self.fractions),
            "seconds": dict(self.stopwatch.seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of a compression of the same model with the same settings.

        Raises:
            CheckpointError: the settings or the target layers are others.
        """
        refuse_other(state, self.config, self.budget.shapes)
        self.moments = Moments.from_state_dict(state["moments"], self._device_of)
        self._window = Moments.from_state_dict(state["window"], self._device_of)
        self._pending = [(loss, terms) for loss, terms in state["pending"]]
        for name, gradient in state["gradients"].items():
            self.targets[name].module.weight.grad = gradient.to(self.targets[name].module.weight, copy=True)
        if state["originals"] is not None:
            self._originals = {n: W.to(self._device_of(n), copy=True) for n, W in state["originals"].items()}
        self._factors = {n: Factors(*pair).to(self.targets[n].weight) for n, pair in state["factors"].items()}
        self._step = None if state["step"] is None else (state["step"][0], state["step"][1])
        self._model_parameters = state["model_parameters"]
        self.losses, self.fractions = list(state["losses"]), list(state["fractions"])
        self.stopwatch.seconds = dict(state["seconds"])

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Undoes what a compression had done to the weights when its `state_dict` was taken.

        Raises:
            CheckpointError: it was of other layers.
        """
        if state["originals"] is None:
            return
        if differing := sorted(state["originals"].keys() ^ self.targets.keys()):
            raise CheckpointError(
                f"the checkpoint was taken while layers were being replaced ({', '.join(differing[:3])}); resume from "
                "another one"
            )
        self._originals = {name: W.to(self._device_of(name)) for name, W in state["originals"].items()}
        self.restore()

    def _device_of(self, name: str) -> torch.device:
        return self.targets[name].weight.device

    def _open_gradients(self) -> dict[str, Tensor]:
        """Gradients of batches whose accumulation window is not closed yet."""
        weights = {name: target.module.weight for name, target in self.targets.items()} if self._pending else {}
        return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}

    def _select(self) -> tuple[dict[str, Spectrum], Selection]:
        with self.stopwatch("spectrum"), exact_products():
            spectra, components = decompose(self.targets, self.moments, self.config.metric, self.progress)
        with self.stopwatch("select"):
            rule = RULES[self.config.selection] if self._plan is None else self._plan.rule
            return spectra, rule(components, self.budget)

    def _start_afresh(self) -> None:
        self.losses.append(self.moments.mean_loss)
        self.moments = Moments()


def refuse_other(
    state: Mapping[str, Any], config: CompressionConfig, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Raises CheckpointError when a saved compression is one with other settings, or of other layers."""
    mine = asdict(config)
    differing = [f"{key} was {state['config'].get(key)!r} and is {mine[key]!r}" for key in mine]
    differing = [text for key, text in zip(mine, differing, strict=True) if state["config"].get(key) != mine[key]]
    if differing:
        raise CheckpointError(
            f"the checkpoint was taken in the middle of a compression with other settings ({'; '.join(differing)}); "
            "go on with the same, or start from a checkpoint of before it"
        )
    saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
    if shapes is not None and saved != dict(shapes):
        others = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
        raise CheckpointError(
            f"the checkpoint was taken in the middle of a compression of other layers: {len(others)} differ "
            f"({', '.join(others[:3])}); go on with the model it was taken of"
        )
