"""The closed-form refit: what is done at each truncated layer on the way through the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zssvd_lightning.correction import refitted_weight
from zssvd_lightning.decomposition import spectrum_of
from zssvd_lightning.distributed import Team
from zssvd_lightning.factorization import HeldFactors
from zssvd_lightning.gathering import Gathering
from zssvd_lightning.statistics import Moments, accumulated
from zssvd_lightning.targets import Target
from zssvd_lightning.whitening import METRICS, Whitening


class Refit:
    """Fits truncated weights one after the other, each at the rank it has.

    Args:
        targets: the layers.
        originals: their weights (m, n) before any truncation.
        gathering: statistics, complete, that the metric goes by.
        factors: whole ones of the truncated layers; get the new ones.
        metric: by its name in `whitening.METRICS`, in which fitted weights are truncated again.
        team: the processes that compress the model together, of which the first fits.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        originals: Mapping[str, Tensor],
        gathering: Gathering,
        factors: HeldFactors,
        metric: str,
        team: Team,
    ) -> None:
        self._targets = targets
        self._originals = originals
        self._gathering = gathering
        self._factors = factors
        self._metric = METRICS[metric]
        self._team = team
        self._inputs: tuple[str, Tensor, Tensor] | None = None

    def meet(self, name: str, dense: Tensor, truncated: Tensor) -> None:
        """Gives a layer its new weight. Collective.

        Args:
            name: the layer.
            dense: its inputs (N, n) in the dense model.
            truncated: the same in the truncated one, as it is now.

        Raises:
            CalibrationError: second moments are not finite or degenerate, or an SVD failed; names the layer.
        """
        leader = self._gathering.moments.leaders.get(name, name)
        if self._inputs is None or self._inputs[0] != leader:
            self._inputs = leader, *self._products(dense, truncated)
        layer = self._gathering.layer_at(0, name, inputs=True)
        rank, fitted = len(self._factors.held[name].down), None
        with self._team.together():
            if layer is not None:
                fitted = self._fitted(name, *self._inputs[1:], layer[1], rank)
        self._factors.put(name, 0, rank, fitted)
        self._targets[name].assign(self._factors.truncated(name))

    def _products(self, dense: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
        """`mean x' x'^T` and `mean x x'^T` over all tokens of all processes."""
        wide = accumulated(truncated.dtype)
        X, there = dense.to(wide), truncated.to(wide)
        tokens = sum(self._team.gathered(len(there)))
        A, C = (self._team.over_batches(left.T @ there) / tokens for left in (there, X))
        return A, C

    def _fitted(self, name: str, A: Tensor, C: Tensor, moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
        whitening = Whitening(self._metric.inputs(moments, name), self._metric.outputs(moments, name))
        W = refitted_weight(self._originals[name], A, C)
        return spectrum_of(self._targets[name], W, whitening).factors(torch.arange(rank, device=W.device))
