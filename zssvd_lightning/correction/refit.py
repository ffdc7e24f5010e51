"""Closed-form refit of each truncated layer during a forward pass through the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.decomposition.decompose import spectrum_of
from zssvd_lightning.decomposition.factors import TruncatedWeights
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.metrics import Metric
from zssvd_lightning.whitening.moments import Moments


class Refit:
    """Refit of the truncated weights one after the other, each at its current rank.

    Args:
        layers: the layers and the processes that hold them; the first process fits.
        originals: name -> weight (m, n) before any truncation.
        gathering: complete statistics, from which the metric is built.
        factors: unsharded factors of the truncated layers, which the refit overwrites.
        metric: coordinates in which fitted weights are truncated again.
    """

    def __init__(
        self,
        layers: LayerSet,
        originals: Mapping[str, Tensor],
        gathering: StatisticsCollector,
        factors: TruncatedWeights,
        metric: Metric,
    ) -> None:
        self._targets, self._team = layers, layers.team
        self._originals = originals
        self._gathering = gathering
        self._factors = factors
        self._metric = metric
        self._inputs: tuple[str, Tensor, Tensor] | None = None

    def meet(self, name: str, dense: Tensor, truncated: Tensor) -> None:
        """Refit the weight of a layer. Collective.

        Args:
            name: layer name.
            dense: inputs (N, n) of the layer in the dense model.
            truncated: inputs (N, n) of the layer in the truncated model, as refitted so far.

        Raises:
            CalibrationError: second moments are not finite or degenerate, or an SVD failed. The message names the
                layer.
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
        """Return `mean x' x'^T` and `mean x x'^T` (n, n) over all tokens of all processes."""
        wide = accumulated(truncated.dtype)
        X, there = dense.to(wide), truncated.to(wide)
        tokens = sum(self._team.gathered(len(there)))
        A, C = (self._team.over_batches(left.T @ there) / tokens for left in (there, X))
        return A, C

    def _fitted(self, name: str, A: Tensor, C: Tensor, moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
        W = refitted_weight(self._originals[name], A, C)
        m, n = W.shape
        metric = self._metric
        whitening = Whitening(metric.input_root(moments, name, n), metric.output_root(moments, name, m))
        return spectrum_of(self._targets[name], W, whitening).factors(torch.arange(rank, device=W.device))


REFIT_PART = 0.5
"""Fraction of the step to the least-squares solution that a refit takes."""


REFIT_DAMPING = 0.2
"""Damping eps, relative to the mean of the diagonal of A."""


def refitted_weight(original: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """Return `W + 1/2 W (C - A) (A + eps I)^-1`, half a step toward the outputs of the dense model.

    Apart from eps, the full step is the least-squares solution W* of `W x = W* x'` over the tokens, where x is the
    input in the dense model and x' that in the truncated model (error compensation, as in the update of SVD-LLM,
    arXiv 2403.07378, and in arXiv 2501.19090). The full step corrects errors that later layers correct again, and
    overfits when tokens are few. Half a step, with eps a fifth of the mean of A's diagonal, works best.

    Args:
        original: W (m, n), before any truncation.
        A: `mean x' x'^T` (n, n).
        C: `mean x x'^T` (n, n).
    """
    eps = REFIT_DAMPING * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    change = torch.linalg.solve(A + eps, (C - A).T @ original.to(A).T).T
    fitted: Tensor = original.to(A) + REFIT_PART * change
    return fitted
