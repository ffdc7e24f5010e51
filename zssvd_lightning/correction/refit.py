"""The closed-form refit: what is done at each truncated layer on the way through the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.decomposition.decompose import spectrum_of
from zssvd_lightning.decomposition.factors import TruncatedWeights
from zssvd_lightning.distributed import Team
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.moments import Moments


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
        gathering: StatisticsCollector,
        factors: TruncatedWeights,
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


REFIT_PART = 0.5
"""Of the way to the least-squares solution, that a refit goes."""


REFIT_DAMPING = 0.2
"""Relative to the mean of the diagonal of the input's second moment."""


def refitted_weight(original: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """`W + 1/2 W (C - A) (A + eps I)^-1`: half of the way to where outputs are nearest to those of the dense model.

    All of it would be the least-squares solution of `W x = W* x'` over the tokens, eps apart, with x the input in the
    dense model and x' in the truncated one (error compensation, as in the update of SVD-LLM, arXiv 2403.07378, and in
    arXiv 2501.19090). What the layers behind make good again is then made good twice, and few tokens are fitted too
    well; half of it and eps of a fifth of the mean of A's diagonal are what does best.

    Args:
        original: W (m, n), before any truncation.
        A: `mean x' x'^T` (n, n).
        C: `mean x x'^T` (n, n).
    """
    eps = REFIT_DAMPING * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    change = torch.linalg.solve(A + eps, (C - A).T @ original.to(A).T).T
    fitted: Tensor = original.to(A) + REFIT_PART * change
    return fitted
