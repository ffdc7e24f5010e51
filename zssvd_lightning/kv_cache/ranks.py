"""Ranks of all heads under one budget of numbers per token."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zssvd_lightning.errors import BudgetError

LEAST_RANK = 1
"""Lowest rank of a head."""


def ranks_under(errors: Sequence[Tensor], ratio: float) -> list[int]:
    """Return the ranks of least total error that keep at most `ratio` of all components.

    Every component takes one number per token, so the components of largest error are kept, over all layers and heads.
    Within a head these are its first, because its errors descend.

    Args:
        errors: error of each component (d,) that is dropped, for the keys and the values of each head.
        ratio: part of the components to keep.

    Raises:
        BudgetError: the ratio does not leave one component to each head.
    """
    total = sum(map(len, errors))
    allowed = math.floor(ratio * total + 1e-9)
    if allowed < LEAST_RANK * len(errors):
        raise BudgetError(
            f"ratio {ratio} keeps {allowed} of {total} numbers per token, but the keys and the values of each head "
            f"need {LEAST_RANK}; the least ratio is {LEAST_RANK * len(errors) / total:.4f}"
        )
    owner = torch.cat([torch.full((len(each) - LEAST_RANK,), index) for index, each in enumerate(errors)])
    beyond = torch.cat([each[LEAST_RANK:].cpu() for each in errors])
    kept = beyond.argsort(descending=True, stable=True)[: allowed - LEAST_RANK * len(errors)]
    return [LEAST_RANK + int(count) for count in owner[kept].bincount(minlength=len(errors))]
