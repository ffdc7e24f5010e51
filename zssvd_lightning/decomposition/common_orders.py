"""Orders of hidden widths that several layers have in common, so that none of them needs to reorder.

Shapes: hidden width h; a layer's matrix M (h, k), whose rows depend on each other as its outputs (or inputs) there do.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from torch import Tensor

from zssvd_lightning.calibration.widths.trials import Width
from zssvd_lightning.decomposition.nested_pivots import nested_pivots
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import PivotError

logger = logging.getLogger(__name__)

LARGEST = 16.0
"""Largest absolute coefficient by a common order. With larger ones, layers keep orders of their own: errors of rounding
to 16 bits grow with the coefficients."""


class Side(Enum):
    """Side of a layer at a hidden width."""

    ROWS = "rows"
    """The layer writes the width."""
    COLUMNS = "columns"
    """The layer reads the width."""


@dataclass
class Orders:
    """New orders of outputs and inputs, by layer name; layers without an entry keep theirs."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    """Order (m,) of the outputs of a layer, which begins with its pivot rows."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Order (n,) of the inputs of a layer, which begins with its pivot columns unless it has an order of rows."""


def common_orders(
    widths: Sequence[Width], truncated: Collection[str], basis: Callable[[str, Side], Tensor], team: Team
) -> Orders:
    """Return an order for every hidden width that allows one. Collective.

    All layers of the width must be truncated, and the coefficients at most `LARGEST`. A layer between two such widths
    holds pivot rows, for which any order of its inputs will do. Widths are therefore taken from the last to the first.

    Args:
        widths: widths whose order is free, in the order in which their consumers run.
        truncated: names of the low-rank layers.
        basis: function that returns M (h, k) of a layer, for its pivot rows or columns; collective.
        team: the processes. The first decides.
    """
    orders, with_dense, too_large = Orders(), 0, 0
    for width in reversed(widths):
        taken = width.consumer in orders.columns or any(name in orders.rows for name in width.producers)
        if taken or any(name not in truncated for name in width.members):
            with_dense += 1
            continue
        matrices = [basis(name, Side.ROWS) for name in width.producers]
        if width.consumer not in orders.rows:
            matrices.append(basis(width.consumer, Side.COLUMNS))
        order = team.decide_on_first(partial(bounded_order, matrices))
        if order is None:
            too_large += 1
            continue
        orders.rows |= dict.fromkeys(width.producers, order)
        orders.columns[width.consumer] = order
    if team.rank == 0:
        logger.info(
            "%d of %d pivoted layers need no reordering (%d hidden widths; of others, %d have a layer that stays "
            "dense, and %d would need coefficients above %g)",
            len(orders.rows.keys() | orders.columns.keys()),
            len(truncated),
            len(widths) - with_dense - too_large,
            with_dense,
            too_large,
            LARGEST,
        )
    return orders


def bounded_order(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return the `nested_order` of matrices M_i (h, k_i), or None if a coefficient is above `LARGEST`.

    None is also returned for matrices that have no such order. Other errors are those of `nested_pivots`.
    """
    try:
        found = nested_pivots(matrices)
    except PivotError:
        return None
    return found.order if found.largest <= LARGEST else None
