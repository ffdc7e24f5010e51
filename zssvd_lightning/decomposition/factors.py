"""Truncated weights, computed from spectra and a selection, and the low-rank layers that replace the dense ones.

Shapes: up (m, k), down (k, n), W_k (m, n).
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.widths.free_widths import FreeWidths
from zssvd_lightning.decomposition.common_orders import Orders, Side, common_orders
from zssvd_lightning.decomposition.decompose import Decomposition
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import NonFiniteError
from zssvd_lightning.layers.apart.removed import RemovedLinear
from zssvd_lightning.layers.base import Dense, carry_hooks
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, PivotForm
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.pivots import Pivots, choose_pivots, coefficients
from zssvd_lightning.layers.registry import Factored, form_for, trained_form
from zssvd_lightning.model.targets import local_part
from zssvd_lightning.selection.storages import STORAGES

Pivoted = PivotedLinear | ColumnPivotedLinear
"""Layers of pivots and coefficients."""


class Factors(NamedTuple):
    """Factors of a truncated weight, `W_k = up @ down`."""

    up: Tensor
    down: Tensor

    def to(self, like: Tensor) -> "Factors":
        """Return the factors on the device and in the type of `like`."""
        return Factors(self.up.to(like), self.down.to(like))


def truncated_weight(factors: Factors) -> Tensor:
    """Return `W_k = (U_k sqrt(S_k)) (sqrt(S_k) V_k^T L^-1)` (m, n)."""
    return factors.up @ factors.down


def low_rank_layer(
    old: Dense, factors: Factors, bias: Tensor | None, form: type[LowRankLinear] = LowRankLinear
) -> LowRankLinear:
    """Return the layer of two factors that replaces `old`.

    Bias, `requires_grad` flags, training mode and forward and backward hooks carry over.
    """
    new = form.like(old, rank=len(factors.down)).to_empty(device=factors.up.device)
    new.fill(*factors, bias)
    carry_hooks(new, old)
    return new


def pivoted_layer(
    old: Dense, factors: Factors, bias: Tensor | None, pivots: Pivots, form: type[Pivoted], *, ordered: bool = True
) -> Pivoted:
    """Return the pivoted layer that replaces `old`, as in `low_rank_layer`. `pivots` are those of `form.basis`.

    Without `ordered`, it has its outputs, or inputs for columns, in the order of the pivots.
    """
    new = form.like(old, rank=len(factors.down), ordered=ordered).to_empty(device=factors.up.device)
    new.fill(*factors, bias, *pivots)
    carry_hooks(new, old)
    return new


class TruncatedWeights:
    """Factors of all truncated layers, or this process's part of them, as its team determines.

    Factors have the type of the weights. With storage `pivoted` they have a wider type, so that the pivots and
    coefficients computed from them are rounded only once.

    Args:
        layers: the layers and the processes that hold them.
        storage: storage of the low-rank layers. 8-bit layers are created from the factors later.
        held: mapping that stores the factors; None for an empty dictionary.

    Attributes:
        held: this process's part of the factors, by layer name.
    """

    def __init__(
        self, layers: LayerSet, storage: str = "factors", held: MutableMapping[str, Factors] | None = None
    ) -> None:
        self._targets, self._team = layers, layers.team
        self._kind = STORAGES[storage].layer
        self._pivots = issubclass(trained_form(self._kind), PivotForm)
        self.held: MutableMapping[str, Factors] = {} if held is None else held
        self._known_finite = False

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the truncated layers."""
        return iter(self.held)

    def __len__(self) -> int:
        """Return the number of truncated layers."""
        return len(self.held)

    def take(self, found: Decomposition, name: str, kept: Tensor) -> None:
        """Store the factors of the components with indices `kept` (k,), sent by the layer's owner. Collective."""
        owner = found.owners[name]
        self.put(name, owner, len(kept), found.spectra[name].factors(kept) if owner == self._team.rank else None)

    def put(self, name: str, owner: int, k: int, factors: tuple[Tensor, Tensor] | None) -> None:
        """Store factors of rank k, which only process `owner` passes; the others pass None. Collective."""
        like, (m, n), (up, down) = self._like(name), self._targets[name].shape, factors or (None, None)
        if k == 0:  # removed with its expert
            self.held[name] = Factors(like.new_empty(m, 0), like.new_empty(0, n))
            return
        self.held[name] = Factors(
            self._team.from_owner(owner, up, (m, k), like),
            self._team.from_owner(owner, down, (k, n), like),
        )
        self._known_finite = False

    def truncated(self, name: str) -> Tensor:
        """Return this process's part of a layer's truncated weight, in the type of the weight. Collective."""
        target = self._targets[name]
        with _exact_on(target.weight.device):
            W = truncated_weight(self._whole(name)).to(target.weight.dtype)
        return self._team.part(W, target.split)

    def put_into_model(self, put_back: Callable[[str], None]) -> None:
        """Set the weights of the model to the truncated ones, and those of other layers by `put_back`. Collective."""
        for name, target in self._targets.items():
            if name in self.held:
                target.assign(self.truncated(name))
            else:
                put_back(name)

    def layers(self, widths: FreeWidths) -> Iterator[tuple[str, Factored | RemovedLinear]]:
        """Yield the name and the low-rank layer of each truncated layer, and what is left of removed ones. Collective.

        Layers that meet in a hidden width whose order is free get a common order there, which begins with pivots of
        each. They need no reordering, and the function of the model stays the same. A layer that stays dense keeps the
        order of the widths at both of its sides. The number of layers that need no reordering is logged.

        Args:
            widths: hidden widths that were tried on this process.

        Raises:
            NonFiniteError: see `layer`.
        """
        if not self.held:
            return
        self.refuse_non_finite()
        free = FreeWidths.of_all(self._team.gathered(widths.state_dict())).free
        # by `up`, which has all k columns on every process, while `down` may have no row on some
        removed = {name for name, factors in self.held.items() if not factors.up.shape[1]}
        low_rank = [name for name in self.held if name not in removed]
        orders = (
            common_orders(free, low_rank, self._basis, self._team) if self._kind == PivotedLinear.kind else Orders()
        )
        for name in self:
            if name in removed:
                yield name, _removed_layer(self._targets[name].module)
            else:
                yield name, self.layer(name, orders.rows.get(name), orders.columns.get(name))

    def layer(self, name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> Factored:
        """Return the whole low-rank layer that replaces a truncated layer. Collective.

        Args:
            name: name of the layer.
            rows: new order (m,) of its outputs, which begins with pivot rows; None to keep their order.
            columns: new order (n,) of its inputs, which begins with pivot columns unless there are `rows`; None to keep
                their order.

        Raises:
            NonFiniteError: the factors of this or another layer contain NaN or infinite values.
        """
        self.refuse_non_finite()
        old, factors = self._targets[name].module, self._whole(name)
        bias = None if old.bias is None else self._team.whole(local_part(old.bias.detach()), len(old.bias))
        with _exact_on(factors.up.device):
            form = form_for(self._kind, *self._targets[name].shape)
            if rows is not None:
                if columns is not None:
                    factors = Factors(factors.up, factors.down[:, columns.to(factors.down.device)])
                return self._with_order(rows, PivotedLinear, old, factors, bias)
            if columns is not None:
                return self._with_order(columns, ColumnPivotedLinear, old, factors, bias)
            if not issubclass(form, LowRankLinear):
                # processes may round differently and would then choose different pivots
                pivots = self._team.decide_on_first(
                    lambda: choose_pivots(form.basis(*factors)).to("cpu", old.weight.dtype)
                )
                return pivoted_layer(old, factors, bias, pivots, form)
            return low_rank_layer(old, factors, bias, form)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the factors by layer name, in the form the team saves. Collective."""
        to_save = {}
        for name, (up, down) in self.held.items():
            saved = (
                self._team.weight_to_save(up, self._targets[name].shape[0]),
                self._team.weight_to_save(down, up.shape[1]),
            )
            if saved[0] is not None and saved[1] is not None:
                to_save[name] = [saved[0], saved[1]]
        return to_save

    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Load this process's part of the factors in a `state_dict`."""
        for name, pair in state.items():
            self.held[name] = Factors(*map(self._team.part, pair)).to(self._like(name))
        self._known_finite = False

    def _with_order(
        self, order: Tensor, form: type[Pivoted], old: Dense, factors: Factors, bias: Tensor | None
    ) -> Pivoted:
        """Return a layer in another order of its outputs, or of its inputs for columns. Collective."""
        pivots = self._team.decide_on_first(
            lambda: Pivots(order, coefficients(form.basis(*factors), order)).to("cpu", old.weight.dtype)
        )
        return pivoted_layer(old, factors, bias, pivots, form, ordered=False)

    def _basis(self, name: str, side: Side) -> Tensor:
        """Return the matrix among whose rows the pivot rows, or columns, of a layer are chosen. Collective."""
        return (PivotedLinear if side is Side.ROWS else ColumnPivotedLinear).basis(*self._whole(name))

    def _whole(self, name: str) -> Factors:
        up, down = self.held[name]
        return Factors(self._team.whole(up, self._targets[name].shape[0]), self._team.whole(down, up.shape[1]))

    def _like(self, name: str) -> Tensor:
        """Return an empty tensor with the device and type of a layer's factors."""
        weight = self._targets[name].weight
        wide = accumulated(weight.dtype)
        return weight.new_empty(0, dtype=wide if self._pivots else weight.dtype)

    def refuse_non_finite(self) -> None:
        """Raise NonFiniteError unless the factors of all layers are finite. Runs before the first layer. Collective."""
        if self._known_finite:
            return
        device = next(iter(self.held.values())).up.device
        counts = [((~up.isfinite()).sum() + (~down.isfinite()).sum()).to(device) for up, down in self.held.values()]
        broken = self._team.over_rows(torch.stack(counts))
        for name, count in zip(self.held, broken.tolist(), strict=True):
            if count:
                target = self._targets[name]
                raise NonFiniteError(
                    f"the factors of {name} {target.shape} hold NaN or infinite values in "
                    f"{str(self.held[name].up.dtype).removeprefix('torch.')}; compress in float32 or bfloat16, "
                    "calibrate on more tokens, or add it to ignore"
                )
        self._known_finite = True


def _removed_layer(old: Dense) -> RemovedLinear:
    """Return what is left of a layer whose expert is removed."""
    new = RemovedLinear.like(old).to_empty(device=old.weight.device)
    new.removed.fill_(1)
    carry_hooks(new, old)
    return new


@contextmanager
def _exact_on(device: torch.device) -> Iterator[None]:
    """Compute matrix products in the type of their operands, regardless of autocast and precision settings."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield
