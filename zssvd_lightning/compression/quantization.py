"""8 bits: the forms in which `remap` and `hq` keep layers, and which rows of the factors stay in 16 bits.

Shapes: W (m, n), up (m, k), down (k, n). Rounding is that of the factors as they are stored, after un-whitening.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.errors import QuantizationError, TargetError
from zssvd_lightning.layers.base import CompressedLinear, Dense, carry_hooks, shape_of
from zssvd_lightning.layers.int8 import EightBitLinear, Int8Linear, Int8LowRankLinear, balance
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.model.adapters import merge_adapters
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.whitening.rounding import Importance


def quantize(model: nn.Module, storage: str = "remap", importances: Mapping[str, Importance] | None = None) -> None:
    """Turns all low-rank layers of `model`, adapters on them included, into 8-bit ones, in place.

    Args:
        model: any module, compressed with the same `storage`, so that its ranks are those of the budget.
        storage: `remap` leaves as many rows or columns of the larger factor in 16 bits as it has more than the
            smaller; `hq` has all in 8 bits, and the dense layers that could have been compressed too.
        importances: of the layers by name; given them, `remap` chooses what stays in 16 bits by what rounding costs,
            over all layers, instead of the last rows or columns of each.

    Raises:
        QuantizationError: there is no low-rank layer, one is pivoted, an importance is missing, or a weight is not
            finite.
    """
    if storage not in ("remap", "hq"):
        raise QuantizationError(f"storage {storage!r} has not all layers in 8 bits; there are 'remap' and 'hq'")
    pivoted = (name for name, module in model.named_modules() if isinstance(module, PivotedLinear))
    if name := next(pivoted, None):
        raise QuantizationError(
            f"{name} is kept as pivot rows, which have no form in 8 bits; compress the dense model with "
            f"storage={storage!r}"
        )
    merge_adapters(model)
    names = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if not names:
        raise QuantizationError(f"{type(model).__name__} has no low-rank layer; compress it with storage={storage!r}")
    if storage == "hq":
        with suppress(TargetError):  # all that could be were made low-rank
            names += find_targets(model)
    quantize_layers(model, names, storage, importances)


def quantize_layers(
    model: nn.Module, names: Iterable[str], storage: str, importances: Mapping[str, Importance] | None = None
) -> None:
    """Puts the layers of these names into the form that `storage` has for them, in place; see `quantize`."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name, new in in_8_bits(layers, storage, importances).items():
        replace_module(model, layers[name], new)
    mark(model)


def in_8_bits_already(model: nn.Module) -> bool:
    """Whether `model` has layers in 8 bits."""
    return any(isinstance(module, EightBitLinear) for module in model.modules())


def in_8_bits(
    layers: Mapping[str, Dense | LowRankLinear], storage: str, importances: Mapping[str, Importance] | None = None
) -> dict[str, CompressedLinear]:
    """The 8-bit forms of layers, by name; `remap` has none for dense ones. See `quantize`."""
    for name, layer in layers.items():
        if not all(parameter.isfinite().all() for parameter in layer.parameters()):
            raise QuantizationError(f"{name} has weights that are NaN or infinite, which 8 bits would hide")
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLinear)}
    if storage != "remap":
        wide = {name: _none(layer) for name, layer in low_rank.items()}
    elif importances is None:
        wide = {name: _last(layer) for name, layer in low_rank.items()}
    else:
        wide = _costliest(low_rank, importances)
    made: dict[str, CompressedLinear] = {n: Int8LowRankLinear.of(layer, *wide[n]) for n, layer in low_rank.items()}
    if storage != "remap":
        made |= {n: Int8Linear.of(layer) for n, layer in layers.items() if not isinstance(layer, LowRankLinear)}
    for name, new in made.items():
        if not all(value.isfinite().all() for value in new.state_dict().values()):
            raise QuantizationError(f"{name} has entries that float16 cannot hold beside others; use storage='factors'")
        carry_hooks(new, layers[name])
    return made


def rounding_costs(layer: LowRankLinear, found: Importance) -> tuple[Tensor, Tensor]:
    """What it is predicted to cost to keep a row of `up` (m,) or a column of `down` (n,) in 8 bits.

    To second order, an error E of W costs `1/2 sum_i B_i E_i A E_i^T` with B_i the importance of output i. A row e of
    errors in `up` gives `B_i sum_c e_c^2 s_c`, since factors of a whitened SVD have `down A down^T = diag(s)`, with s
    the squared norms of the columns of `up`; nearly so after some training. A column e of errors in `down` at input j
    gives `A_jj sum_c e_c^2 sum_i B_i up_ic^2`. (Loss-aware remapping is an idea of IO-SVD, arXiv 2605.15626.)
    """
    up, down = layer.up.weight.detach().float(), layer.down.weight.detach().float()
    stored_up, stored_down = Int8LowRankLinear.of(layer, *_none(layer)).factors()
    shift, _ = balance(up, down)
    up_error, down_error = stored_up / shift - up, stored_down * shift[:, None] - down
    outputs, inputs = found.outputs.to(up), found.inputs.to(up)
    rows = outputs * (up_error.square() @ up.square().sum(0))
    columns = inputs * ((outputs @ up.square()) @ down_error.square())
    return rows, columns


def _none(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    m, n = shape_of(layer)
    return torch.zeros(m, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)


def _last(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    m, n = shape_of(layer)
    return torch.arange(m) >= min(m, n), torch.arange(n) >= min(m, n)


def _costliest(
    layers: Mapping[str, LowRankLinear], importances: Mapping[str, Importance]
) -> dict[str, tuple[Tensor, Tensor]]:
    """As many numbers in 16 bits as with `_last`, at most, in the rows and columns that save most per number."""
    if missing := sorted(layers.keys() - importances.keys()):
        raise QuantizationError(f"no importance of {', '.join(missing[:3])}; compress with rows_in_16_bits=loss_aware")
    room = sum(layer.rank * abs(layer.out_features - layer.in_features) for layer in layers.values())
    costs = {name: torch.cat(rounding_costs(layer, importances[name])).cpu() for name, layer in layers.items()}
    names = list(layers)
    per_number = torch.cat([costs[name] / layers[name].rank for name in names])
    owner = torch.cat([torch.full((len(costs[name]),), i) for i, name in enumerate(names)])
    ranks = torch.tensor([layers[name].rank for name in names])
    order = per_number.argsort(descending=True, stable=True)
    taken = order[ranks[owner[order]].cumsum(0) <= room]
    chosen = torch.zeros(len(per_number), dtype=torch.bool)
    chosen[taken] = True
    wide = {}
    for i, name in enumerate(names):
        rows, columns = chosen[owner == i].tensor_split([layers[name].out_features])
        wide[name] = rows, columns
    return wide
