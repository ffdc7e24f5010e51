"""Decomposition of layers whose statistics come a few layers at a time, so that they need not be kept."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zssvd_lightning._numerics import exact_products
from zssvd_lightning._resources import Stopwatch, trim_heap
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.reach import Unreached, unreached
from zssvd_lightning.decomposition.decompose import Decomposition, decompose
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.offload.media import read_on_host
from zssvd_lightning.selection.components import Components
from zssvd_lightning.whitening.cholesky import warn_of_jitter
from zssvd_lightning.whitening.metrics import Metric
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.rounding import Importance
from zssvd_lightning.whitening.spectrum import Spectrum


class DecompositionInParts:
    """Decomposition that grows with the statistics of each part of the layers, and drops these statistics.

    Args:
        model: the model.
        layers: all layers that may come.
        metric: coordinates of the SVD.
        spectra: empty mapping that stores the spectra.
        highest: number of components of each layer whose factors are stored; None for all.
        outputs: True if layers without output gradients count as not reached.
        weigh: also compute the importance of outputs and inputs.
        round_off: also compute the predicted cost of storing components in 8 bits.
        keep: keep the second moments of the parts, for later steps; gradients are dropped all the same.

    Attributes:
        reasons: layers that no batch has reached, each with the reason; they are not decomposed.
        stopwatch: seconds of the decompositions, as step `spectrum`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSet,
        metric: Metric,
        spectra: MutableMapping[str, Spectrum],
        *,
        highest: Mapping[str, int] | None = None,
        outputs: bool = False,
        weigh: bool = False,
        round_off: bool = False,
        keep: bool = False,
    ) -> None:
        self.reasons: dict[str, Unreached] = {}
        self.stopwatch = Stopwatch()
        self._model, self._layers, self._spectra, self._outputs, self._keep = model, layers, spectra, outputs, keep
        self._decompose: Callable[[LayerSet, StatisticsCollector], Decomposition] = lambda part, statistics: decompose(
            part,
            statistics,
            metric,
            weigh=weigh,
            round_off=round_off,
            spectra=spectra,
            highest=highest,
            warn=False,
        )
        self._found = Decomposition({}, spectra, {}, {})
        self._taken: set[str] = set()

    @torch.no_grad()
    def take(self, part: LayerSet, moments: Moments, total: Moments) -> None:
        """Decompose layers by their statistics, and drop these from `moments` while doing so.

        Args:
            part: the layers.
            moments: sums of these layers over all batches.
            total: the counts of all batches.

        Raises:
            CalibrationError: see `decompose`.
        """
        with self.stopwatch("spectrum"), exact_products():
            self._taken |= part.keys()
            statistics = StatisticsCollector(self._model, part)
            statistics.moments = replace(
                moments,
                output_terms=total.output_terms,
                loss_sum=total.loss_sum,
                loss_terms=total.loss_terms,
                with_gradient=[],
                with_outputs=[],
            )
            statistics.complete()
            reasons = unreached(part, statistics.moments, outputs=self._outputs)
            self.reasons |= reasons
            reached = part.without(reasons)
            leaders = {name: moments.leaders[name] for name in reached}
            for leader in dict.fromkeys(leaders.values()):
                names = [name for name, of in leaders.items() if of == leader]
                self._add(self._decompose(reached.without(reached.keys() - set(names)), statistics))
                self._drop(moments, [leader], names)
                trim_heap()
            self._drop(moments, list(moments.input_sums), list(part))

    def state_of(self, part: LayerSet) -> dict[str, Any]:
        """Return what `take` has found of some layers, as plain types and tensors, for `take_up`."""
        found = self._found
        names = [name for name in part if name in found.components]
        with read_on_host():
            spectra = {name: vars(self._spectra[name]) for name in names}
        return {
            "spectra": spectra,
            "components": {name: vars(found.components[name]) for name in names},
            "importances": {name: list(found.importances[name]) for name in names if name in found.importances},
            "jitters": dict(found.jitters),
            "reasons": {name: str(reason) for name, reason in self.reasons.items() if name in part},
        }

    def take_up(self, part: LayerSet, state: Mapping[str, Any]) -> None:
        """Add what another object has found of some layers: its `state_of`."""
        self._taken |= part.keys()
        self.reasons |= {name: Unreached(reason) for name, reason in state["reasons"].items()}
        for name, spectrum in state["spectra"].items():
            self._spectra[name] = Spectrum(**spectrum)
        components = {name: Components(**saved) for name, saved in state["components"].items()}
        importances = {name: Importance(*pair) for name, pair in state["importances"].items()}
        owners = dict.fromkeys(components, 0)
        self._add(Decomposition(owners, self._spectra, components, importances, state["jitters"]))

    def finished(self) -> Decomposition:
        """Return the decomposition of all layers that were reached, in module order, and warn of jitters."""
        found = self._found
        warn_of_jitter(found.jitters)
        in_order = {name: found.components[name] for name in self._layers if name in found.components}
        return replace(found, components=in_order)

    def of_all(self, total: Moments) -> dict[str, Unreached]:
        """Return all layers that no batch has reached, in module order, including those that never came.

        Args:
            total: the counts of all batches.
        """
        never = self._layers.without(self._taken)
        reasons = self.reasons | (unreached(never, total, outputs=self._outputs) if never else {})
        return {name: reasons[name] for name in self._layers if name in reasons}

    def _add(self, part: Decomposition) -> None:
        found = self._found
        self._found = Decomposition(
            {**found.owners, **part.owners},
            self._spectra,
            {**found.components, **part.components},
            {**found.importances, **part.importances},
            {**found.jitters, **part.jitters},
        )

    def _drop(self, moments: Moments, leaders: list[str], names: list[str]) -> None:
        for sums, dropped in (
            (moments.gradient_sums, names),
            (moments.input_sums, () if self._keep else leaders),
            (moments.output_sums, () if self._keep else names),
        ):
            for name in dropped:
                sums.pop(name, None)
