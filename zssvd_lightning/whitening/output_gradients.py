"""Output gradients: the labels from which they are computed, if not from the labels of the batch.

The curvature of a cross-entropy loss with respect to its logits is `F = diag(p) - p p^T`, where p is the predicted
distribution. A draw returns random v with `E[v v^T] = F`. Backpropagating v in place of the loss gradient gives each
layer a D for which `E[D^T D]` is the curvature with respect to its outputs (Fisher information; K-FAC, arXiv
1503.05671).

Shapes: logits and v are (N, V), at the N positions that contribute to the loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64

TOP = 64
"""Number of tokens that `top_k` uses."""


PRIME = 2**24 - 3
"""Largest prime for which all residues, and twice them less the prime, are exact in float32."""


Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Function that draws v (N, V) from logits (N, V) on any device, with a random number generator of the CPU.

Generators of other devices give other numbers for the same seed. Each number belongs to a position and a token, so that
rounding of the logits changes v by no more than rounding, unless a drawn label lies at a boundary.
"""


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return gradients `p - e_label` (N, V) for labels drawn from the predictions (true, not empirical, Fisher)."""
    v = logits.softmax(-1)
    upper = in_float64(v).cumsum(-1)  # of the interval of each token
    drawn = torch.rand(len(v), 1, generator=generator, dtype=torch.float64).to(upper) * upper[:, -1:]
    label = torch.searchsorted(upper, drawn, right=True).clamp_max(v.shape[-1] - 1).to(v.device)
    return v.scatter_add_(-1, label, -torch.ones_like(v[:, :1]))


def top_k(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw v (N, V) for the divergence restricted to the `TOP` most likely tokens (IO-SVD, arXiv 2605.15626).

    `v = sqrt(q) * e - q <sqrt(q), e>`, where e is standard normal and q is the predicted distribution over those
    tokens, normalized to sum to 1.
    """
    tokens = _most_likely(logits, TOP)
    q = logits.gather(-1, tokens).softmax(-1)
    noise = q.sqrt() * _normal(tokens, logits.shape[-1], generator).to(q)
    return torch.zeros_like(logits).scatter_(-1, tokens, noise - q * noise.sum(-1, keepdim=True))


OUTPUT_GRADIENTS: dict[str, Draw | None] = {"empirical": None, "sampled": sampled, "top_k": top_k}
"""Draws by name. None stands for the labels of the batch, whose gradients come from the loss itself."""


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Return the `count` most likely tokens (N, count) in ascending order, or all. Ties go to the first tokens."""
    N, V = logits.shape
    count = min(count, V)
    least = logits.topk(count).values[:, -1:]
    above, equal = logits > least, logits == least
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(N, count)


def _normal(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers (N, k), each determined by its position and its token, not by its place.

    A position and a token have a nonzero residue each. Modulo a prime, their product is uniform over the nonzero
    residues, independently for all tokens of a position and for all positions of a token.
    """
    rows = torch.randint(1, PRIME, (len(tokens), 1), generator=generator).to(tokens.device)
    columns = torch.randint(1, PRIME, (vocabulary,), generator=generator).to(tokens.device)
    residues = rows * columns[tokens] % PRIME
    return math.sqrt(2) * torch.erfinv((2 * residues - PRIME).float() / PRIME)
