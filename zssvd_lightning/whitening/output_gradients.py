"""Output gradients: the labels from which they are computed, if not from the labels of the batch.

The curvature of a cross-entropy loss with respect to its logits is `F = diag(p) - p p^T`, where p is the predicted
distribution. A draw returns random v with `E[v v^T] = F`. Backpropagating v in place of the loss gradient gives each
layer a D for which `E[D^T D]` is the curvature with respect to its outputs (Fisher information; K-FAC, arXiv
1503.05671).

Shapes: logits and v are (N, V), at the N positions that contribute to the loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TOP = 64
"""Number of tokens that `top_k` uses."""


Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Function that draws v (N, V) from logits (N, V)."""


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return gradients `p - e_label` (N, V) for labels drawn from the predictions (true, not empirical, Fisher)."""
    v = logits.softmax(-1)
    label = torch.multinomial(v, 1, generator=generator)
    return v.scatter_add_(-1, label, -torch.ones_like(v[:, :1]))


def top_k(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw v (N, V) for the divergence restricted to the `TOP` most likely tokens (IO-SVD, arXiv 2605.15626).

    `v = sqrt(q) * e - q <sqrt(q), e>`, where e is standard normal and q is the predicted distribution over those
    tokens, normalized to sum to 1.
    """
    top, tokens = logits.topk(min(TOP, logits.shape[-1]))
    q = top.softmax(-1)
    noise = q.sqrt() * torch.randn(q.shape, generator=generator, dtype=q.dtype, device=q.device)
    return torch.zeros_like(logits).scatter_(-1, tokens, noise - q * noise.sum(-1, keepdim=True))


OUTPUT_GRADIENTS: dict[str, Draw | None] = {"empirical": None, "sampled": sampled, "top_k": top_k}
"""Draws by name. None stands for the labels of the batch, whose gradients come from the loss itself."""
