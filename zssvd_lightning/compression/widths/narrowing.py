"""Narrower hidden widths in a compression: which there may be, what each size costs, and the weights of those chosen.

They are chosen in the first truncation, and stay as they are in all later ones.
"""

import logging
from typing import TYPE_CHECKING

from zssvd_lightning._numerics import exact_products
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.calibration.widths.trials import Width
from zssvd_lightning.decomposition.decompose import Decomposition, LayerAtOwner, whitening_of_units
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.selection.widths.narrowings import Narrowing
from zssvd_lightning.whitening.narrowing import made_up

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

logger = logging.getLogger(__name__)


def possible_widths(compression: "Compression") -> list[Width]:
    """Return the hidden widths of which units can be removed in this truncation; none after the first. Collective.

    All layers of a width must have statistics, and be dense so far. Others are logged.
    """
    run = compression
    if not run.config.narrow or run.truncations or run.parts is not None:
        return []
    widths = FreeWidths.of_all(run.team.gathered(run.gathering.free_widths.state_dict())).free
    able = {name for name in run.reached if name not in run.budget.present}
    found = [width for width in widths if able.issuperset(width.members)]
    if run.team.rank == 0:
        logger.info(
            "%d hidden widths can be narrower: units can be removed from %d of %d layers%s",
            len(found),
            len({name for width in found for name in width.members}),
            len(run.targets),
            f"; {len(widths) - len(found)} others have a layer that is low-rank already, or without statistics"
            if len(widths) > len(found)
            else "",
        )
    return found


def groups_of(compression: "Compression") -> dict[str, tuple[int, int]]:
    """Return how many units of each hidden width can go at a time, and must remain, by the layer that reads it."""
    budget, sizes = compression.budget, dict[str, tuple[int, int]]()
    for width in possible_widths(compression):
        h = budget.shapes[width.consumer][1]
        sizes[width.consumer] = budget.step_of_width(h), budget.floor_of_width(h)
    return sizes


def possible_narrowings(compression: "Compression", found: Decomposition) -> list[Narrowing]:
    """Return the sizes that hidden widths may have, with the estimates of a decomposition. Collective."""
    if not found.removed:
        return []
    return [
        Narrowing(width.producers, width.consumer, removed.order, removed.widths, removed.drifts, removed.losses)
        for width in possible_widths(compression)
        if (removed := found.removed.get(width.consumer)) is not None
    ]


def take_narrowed(compression: "Compression", selection: Selection, found: Decomposition) -> None:
    """Compute and store the weights of the layers that read a narrower width, where there are none yet. Collective.

    Raises:
        NonFiniteError: see `NarrowedWeights.take`.
    """
    run = compression
    for name, narrowed in selection.narrowed.items():
        if name in run.narrowed.readers:
            continue
        owner, M = found.owners[name], None
        gathered = run.gathering.layer_at(owner, name, inputs=True)
        with run.team.together(), exact_products():
            if gathered is not None and owner == run.team.rank:
                layer = LayerAtOwner(name, gathered[1].leaders.get(name, name), *gathered)
                M = made_up(layer.weight, whitening_of_units(layer).inputs, narrowed.units)
        run.narrowed.take(name, narrowed, owner, M)
