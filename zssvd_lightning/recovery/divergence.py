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
"""Number of positions compared at a time."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(student / T))`, averaged over rows, in nats.

    From Hinton, Vinyals and Dean, arXiv 1503.02531. Computed in float32 or wider, `POSITIONS` rows at a time.

    Args:
        student: logits (N, V).
        teacher: logits (N, V).
        temperature: T.

    Raises:
        TeacherError: there are no rows.
    """
    refuse_nothing(student)
    found: Tensor = _Divergence.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


def divergence_from_top(student: Tensor, indices: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """Return the divergence with all tokens outside the teacher's top k merged into one.

    See `divergence`; the temperature is applied to the merged distributions.

    Args:
        student: logits (N, V).
        indices: (N, k), the top k tokens.
        log_probabilities: (N, k), the teacher's log-probabilities of these tokens at temperature 1.
        temperature: T, as in `divergence`.

    Raises:
        TeacherError: there are no rows.
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
    """Return the rows (N, ...) of values (B, T, ...) where `mask` (B, T) is True; all rows without such a mask."""
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2] and not mask.all():
        return values[mask]
    return values.flatten(0, -2)


def refuse_nothing(student: Tensor) -> None:
    """Raise TeacherError if logits (N, V) have no rows."""
    if not len(student):
        raise TeacherError("a training batch is all padding, so there are no predictions to compare; drop such batches")


class _Divergence(torch.autograd.Function):
    """`divergence` and its gradient `T (softmax(student / T) - softmax(teacher / T)) / N`, computed together.

    Autograd would store several float32 matrices (N, V). This stores one: the difference of probabilities, in the type
    of the student's logits. For float16 logits it is stored in float32, because small differences would become 0 in
    float16 before the loss scale is applied.
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
    """Return log-probabilities (N, k + 1); the last is that of all other tokens together."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_probabilities, rest.log()], -1)
