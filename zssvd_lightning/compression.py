"""The steps of the method on one model, each callable on its own: what the callback and the pipeline share.

Weights are edited in place by `truncate` and `correct`; modules are replaced once, by `factorise`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning.budget import Budget
from zssvd_lightning.calibration import Observation, checked_loss, collect_gradients, observing
from zssvd_lightning.config import CompressionConfig
from zssvd_lightning.correction import best_fraction, projected_step
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.factorization import Factors, install, truncated_weight
from zssvd_lightning.report import LayerReport, Report, Stopwatch
from zssvd_lightning.selection import RULES, Components, Selection
from zssvd_lightning.spectrum import Spectrum
from zssvd_lightning.statistics import Moments, exact_products
from zssvd_lightning.targets import find_targets, replace_module, weights_snapshot
from zssvd_lightning.whitening import METRICS, Whitening, warn_of_jitter

logger = logging.getLogger(__name__)


class Compression:
    """One model on its way to low rank.

    Args:
        model: any module with linear layers.
        config: what to remove and how.
        progress: whether to draw a bar over the long steps.

    Raises:
        TargetError: there is nothing to compress, or something that cannot be.
        BudgetError: the rank floor makes the prune ratio impossible.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, progress: bool = True) -> None:
        self.model = model
        self.config = config
        self.targets = find_targets(model, config.include, config.ignore)
        self.budget = Budget(
            {n: t.shape for n, t in self.targets.items()}, config.prune_ratio, config.min_rank_fraction
        )
        self.moments = Moments()
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
        with observing(self.model, self.targets, self.moments, mask, inputs) as observation:
            yield observation

    def add_loss(self, loss: Tensor, terms: float) -> None:
        """Notes a batch's mean loss until its gradient comes. Raises CalibrationError or NonFiniteError."""
        self._pending.append((checked_loss(loss).item(), terms))

    def collect_gradients(self, weight: float) -> None:
        """Adds the losses noted and `weight` times the gradients on the targets to the statistics, and clears both."""
        for loss, terms in self._pending:
            self.moments.add_loss(loss, terms)
        self._pending = []
        collect_gradients(self.targets, self.moments, weight)

    def discard_gradients(self) -> None:
        """Forgets the losses noted and the gradients on the targets."""
        self._pending = []
        for target in self.targets.values():
            target.module.weight.grad = None

    @torch.no_grad()
    def truncate(self) -> None:
        """Spectra, selection and truncation in place, from the statistics gathered since the last step.

        Raises:
            CalibrationError: the statistics are missing, not finite or degenerate; the message names the layer.
        """
        with self.stopwatch("spectrum"), exact_products():
            spectra, components = self._decompose()
        with self.stopwatch("select"):
            selection = RULES[self.config.selection](components, self.budget)
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
        after = sum(
            m * n if ranks[name] is None else self.budget.stored(name, ranks[name] or 0)
            for name, (m, n) in self.budget.shapes.items()
        )
        return Report(
            asked=self.config.prune_ratio,
            parameters_before=self.budget.total,
            parameters_after=after,
            model_parameters_before=self._model_parameters,
            layers=layers,
            predicted_drift=self._selection.predicted_drift,
            losses=list(self.losses),
            correction_fractions=list(self.fractions),
            seconds=dict(self.stopwatch.seconds),
        )

    def _decompose(self) -> tuple[dict[str, Spectrum], dict[str, Components]]:
        """Spectra and scores, kept on the CPU; one whitening for all layers that share an input."""
        whitenings: dict[str, Whitening] = {}
        spectra: dict[str, Spectrum] = {}
        components: dict[str, Components] = {}
        for name, target in tqdm(self.targets.items(), desc="spectra", unit="layer", disable=not self.progress):
            leader = self.moments.leaders.get(name, name)
            if leader not in whitenings:
                whitenings[leader] = METRICS[self.config.metric](self.moments, name)
            try:
                spectrum = Spectrum.of(target.weight, whitenings[leader])
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise CalibrationError(
                    f"the SVD of {name} {target.shape} failed: {error}; check the weight for NaN and infinite values, "
                    "calibrate on more tokens, or add it to ignore"
                ) from error
            delta = spectrum.sensitivities(self.moments.mean_gradient(name))
            components[name] = Components(spectrum.sigma.cpu(), delta.cpu())
            spectra[name] = spectrum.to("cpu")
        warn_of_jitter(whitenings)
        return spectra, components

    def _start_afresh(self) -> None:
        self.losses.append(self.moments.mean_loss)
        self.moments = Moments()
