"""Kullback-Leibler divergence between the predictions of two models, over whole or top-k distributions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.errors import TeacherError

POSITIONS = 256
"""Positions that are compared at a time."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over rows of logits (N, V), in nats.

    Hinton, Vinyals and Dean, arXiv 1503.02531. It is computed in float32 or wider, some rows at a time.
    """
    refuse_nothing(student)
    found: Tensor = _Divergence.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


def divergence_from_top(student: Tensor, indices: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """The same, of distributions in which all tokens but some are one; a temperature is applied to those.

    Args:
        student: logits (N, V).
        indices: (N, k), the tokens kept.
        log_probabilities: (N, k), the teacher's at temperature 1.
        temperature: see `divergence`.
    """
    refuse_nothing(student)

    def some(s: Tensor, i: Tensor, kept_p: Tensor) -> Tensor:
        kept_q = s.float().gather(-1, i) - s.float().logsumexp(-1, keepdim=True)
        p, q = (_with_rest(kept) / temperature for kept in (kept_p.float(), kept_q))
        return kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)

    parts = zip(*(torch.split(rows, POSITIONS) for rows in (student, indices, log_probabilities)), strict=True)
    sums = [checkpoint(some, *part, use_reentrant=False) for part in parts]
    return temperature**2 * torch.stack(sums).sum() / len(student)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, ...) of values (B, T, ...) where `mask` (B, T) is true; all without a mask of that shape."""
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2] and not mask.all():
        return values[mask]
    return values.flatten(0, -2)


def refuse_nothing(student: Tensor) -> None:
    """Raises TeacherError for logits (N, V) at no position."""
    if not len(student):
        raise TeacherError("a training batch is all padding, so there are no predictions to compare; drop such batches")


class _Divergence(torch.autograd.Function):
    """`divergence` and its gradient `T (softmax(student / T) - softmax(teacher / T)) / N` in one go.

    Autograd would keep several matrices (N, V) of float32. This keeps the difference of probabilities, in the type of
    the student's logits unless that is float16, in which small ones vanish before a loss scale can save them.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        wide = accumulated(student.dtype)
        total = student.new_zeros((), dtype=wide)
        difference = torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else None)
        for s, t, d in zip(*(torch.split(rows, POSITIONS) for rows in (student, teacher, difference)), strict=True):
            log_q, log_p = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (s, t))
            p = log_p.exp()
            total += torch.where(p > 0, p * log_p.sub_(log_q), 0.0).sum()
            d.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(difference)
        ctx.dtype, ctx.factor = student.dtype, temperature / len(student)
        return total * (temperature**2 / len(student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> Any:
        (difference,) = ctx.saved_tensors
        gradient = torch.empty_like(difference, dtype=ctx.dtype)
        for d, g in zip(torch.split(difference, POSITIONS), torch.split(gradient, POSITIONS), strict=True):
            g.copy_(d * (from_above * ctx.factor))
        return gradient, None, None


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Log-probabilities (N, k + 1), the last of everything else."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_probabilities, rest.log()], -1)
