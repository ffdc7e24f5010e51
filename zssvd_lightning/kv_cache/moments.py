"""Sums over the keys, values and queries of a layer, by the head that is cached.

Keys and values are weighted by the attention that they receive. It is often largest on the first token, whose key and
value are unlike all others.

Shapes: H cached heads of width d; vectors X (N, H, d).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.errors import CalibrationError, NonFiniteError
from zssvd_lightning.kv_cache.attention import token_weights


@dataclass
class HeadSums:
    """Weighted sums of vectors and of their squares, in float64: deviations from a large mean are what counts."""

    count: int = 0
    """Number of vectors of each head."""
    weight: Tensor | None = None
    """Sums of the weights w (H,)."""
    total: Tensor | None = None
    """Sums of `w x` (H, d)."""
    squares: Tensor | None = None
    """Sums of `w x x^T` (H, d, d)."""

    def add(self, X: Tensor, weights: Tensor | None = None) -> None:
        """Add the vectors X (N, H, d) with their weights (N, H), which are 1 if None."""
        X = in_float64(X.detach()).transpose(0, 1)
        w = X.new_ones(X.shape[:2]) if weights is None else in_float64(weights).T
        weighted = w[:, :, None] * X
        weight, total, squares = w.sum(1), weighted.sum(1), weighted.mT @ X
        self.count += X.shape[1]
        self.weight = weight if self.weight is None else self.weight + weight
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares

    def mean(self) -> Tensor:
        """Return the means (H, d)."""
        weight, total, _ = self._sums()
        return total / weight[:, None]

    def second_moment(self) -> Tensor:
        """Return the means of `x x^T` (H, d, d)."""
        weight, _, squares = self._sums()
        return squares / weight[:, None, None]

    def covariance(self) -> Tensor:
        """Return the means of `(x - mean) (x - mean)^T` (H, d, d)."""
        mean = self.mean()
        return self.second_moment() - mean[:, :, None] * mean[:, None, :]

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.weight is None or self.total is None or self.squares is None or self.count == 0:
            raise CalibrationError("no token of a batch counts; calibrate on batches that are not all padding")
        return self.weight, self.total, self.squares


@dataclass
class LayerMoments:
    """Sums over the queries, keys and values of one attention layer."""

    keys: HeadSums = field(default_factory=HeadSums)
    """Keys as they are cached, after the rotary embedding, with the weights of `TokenWeights`."""
    values: HeadSums = field(default_factory=HeadSums)
    """Values, with the weights of `TokenWeights`."""
    queries: HeadSums = field(default_factory=HeadSums)
    """Queries of all heads that read a cached head, as further vectors of that head."""
    scaling: float = 1.0
    """Factor of the product of query and key in the softmax."""
    output: Tensor | None = None
    """`sum_h W_h W_h^T` (H, d, d) over the heads that read a cached head, where `v W_h` (m,) is what the layer's output
    gets of a value v (d,); None if the output projection was not found."""

    def add(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Add the tokens of a batch.

        Args:
            queries: queries (B, G H, T, d), where those of a cached head follow each other.
            keys: keys (B, H, T, d).
            values: values (B, H, T, d).
            mask: positions (B, T) that count; None for all.
        """
        B, H, T, d = keys.shape
        grouped = queries.reshape(B, H, -1, T, d).permute(0, 3, 2, 1, 4)  # (B, T, G, H, d)
        kept = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
        kept = kept.to(keys.device)
        weights = token_weights(queries, keys, self.scaling, kept)
        self.queries.add(grouped[kept].flatten(0, 1))
        self.keys.add(keys.transpose(1, 2)[kept], weights.keys.transpose(1, 2)[kept])
        self.values.add(values.transpose(1, 2)[kept], weights.values.transpose(1, 2)[kept])

    def refuse_non_finite(self, layer: int) -> None:
        """Raise NonFiniteError if a sum is NaN or infinite."""
        for name in ("queries", "keys", "values"):  # the weights of the later ones are made of the earlier ones
            if not getattr(self, name).second_moment().isfinite().all():
                raise NonFiniteError(
                    f"the {name} of attention layer {layer} are NaN or infinite; calibrate in float32 or bfloat16"
                )
