"""Output sides: whose labels the gradients at the outputs are of, when they are not the batch's own.

The curvature of a cross-entropy loss by its logits is `F = diag(p) - p p^T`, p being what the model predicts. A draw
gives random v with `E[v v^T] = F`. Sent back in place of the gradient of the loss, they give each layer a D with
`E[D^T D]` the curvature by its outputs (Fisher information; K-FAC, arXiv 1503.05671).

Shapes: logits and v are (N, V), at the N positions that the loss is of.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TOP = 64
"""Tokens that `top_k` goes by."""


Draw = Callable[[Tensor, torch.Generator], Tensor]


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients for labels drawn from the predictions, `p - e_label` (the Fisher information, not the empirical)."""
    v = logits.softmax(-1)
    label = torch.multinomial(v, 1, generator=generator)
    return v.scatter_add_(-1, label, -torch.ones_like(v[:, :1]))


def top_k(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws for the divergence over the likeliest tokens alone, as IO-SVD measures it (arXiv 2605.15626).

    `v = sqrt(q) * e - q <sqrt(q), e>` with e normal and q the predictions over those tokens, which sum to one.
    """
    top, tokens = logits.topk(min(TOP, logits.shape[-1]))
    q = top.softmax(-1)
    noise = q.sqrt() * torch.randn(q.shape, generator=generator, dtype=q.dtype, device=q.device)
    return torch.zeros_like(logits).scatter_(-1, tokens, noise - q * noise.sum(-1, keepdim=True))


OUTPUT_GRADIENTS: dict[str, Draw | None] = {"empirical": None, "sampled": sampled, "top_k": top_k}
"""By name; None for the labels of the batch, whose gradients come back with the loss itself."""
