"""Conversion of layers to 8 bits for storage `remap` and `hq`, with the choice of rows that stay in 16 bits.

Shapes: W (m, n), up (m, k), down (k, n). Rounding is applied to the stored factors, after whitening is undone.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.errors import QuantizationError, TargetError
from zssvd_lightning.layers.base import CompressedLinear, Dense, carry_hooks, shape_of
from zssvd_lightning.layers.int8 import EightBitLinear, balance
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.layers.storage import round_all
from zssvd_lightning.model.adapters import merge_adapters
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import find_targets, refuse_adapted
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.whitening.rounding import Importance


def quantize(model: nn.Module, storage: str = "remap", importances: Mapping[str, Importance] | None = None) -> None:
    """Convert all low-rank layers of `model` to 8 bits in place, after merging their adapters.

    Args:
        model: any module, compressed with the same `storage` so that its ranks fit the budget.
        storage: `remap` leaves the rows or columns by which the larger factor exceeds the smaller in 16 bits. `hq`
            stores everything in 8 bits, including dense layers that could have been compressed.
        importances: layer name -> importance. If given, `remap` chooses the rows and columns in 16 bits over all
            layers, by the predicted cost of rounding. Otherwise the last rows or columns of each layer stay in 16 bits.

    Raises:
        QuantizationError: the storage does not put all layers in 8 bits, there is no low-rank layer, a layer is
            pivoted or has an adapter of PEFT on its factors, an importance is missing, or a weight is not finite.
        TargetError: a dense layer to be stored in 8 bits has an adapter of PEFT.
    """
    form = STORAGES.get(storage)
    if form is None or form.rounded is None:
        those = " and ".join(map(repr, STORAGES.those(lambda form: form.rounded is not None)))
        raise QuantizationError(f"storage {storage!r} has not all layers in 8 bits; there are {those}")
    pivoted = (name for name, module in model.named_modules() if isinstance(module, PivotForm))
    if name := next(pivoted, None):
        raise QuantizationError(
            f"{name} is kept as pivot rows or columns, which have no form in 8 bits; compress the dense model with "
            f"storage={storage!r}"
        )
    merge_adapters(model)
    names = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if not names:
        raise QuantizationError(f"{type(model).__name__} has no low-rank layer; compress it with storage={storage!r}")
    if form.rounded_dense is not None:
        refuse_adapted(model)
        with suppress(TargetError):  # every possible target is low-rank already
            names += find_targets(model)
    quantize_layers(model, names, storage, importances)


def quantize_layers(
    model: nn.Module, names: Iterable[str], storage: str, importances: Mapping[str, Importance] | None = None
) -> None:
    """Convert the named layers in place to the form that `storage` defines; see `quantize`."""
    put_in_8_bits(model, {name: model.get_submodule(name) for name in names}, storage, importances)


def put_in_8_bits(
    model: nn.Module,
    layers: Mapping[str, Any],
    storage: str,
    importances: Mapping[str, Importance] | None = None,
    replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
) -> dict[str, CompressedLinear]:
    """Replace layers by their 8-bit forms, with `replace(model, old, new)`, and return these. See `quantize`."""
    made = in_8_bits(layers, storage, importances)
    for name, new in made.items():
        replace(model, layers[name], new)
    mark(model)
    return made


def in_8_bits_already(model: nn.Module) -> bool:
    """Return True if `model` has layers in 8 bits."""
    return any(isinstance(module, EightBitLinear) for module in model.modules())


def in_8_bits(
    layers: Mapping[str, Dense | LowRankLinear], storage: str, importances: Mapping[str, Importance] | None = None
) -> dict[str, CompressedLinear]:
    """Return the 8-bit forms of layers by name. `remap` has none for dense layers. See `quantize`.

    Raises:
        QuantizationError: a layer has an adapter of PEFT, weights that are NaN or infinite, or entries that float16
            cannot hold; or a registered storage returned a layer of another shape or rank.
    """
    for name, layer in layers.items():
        if any(wraps_by_peft(part) for part in layer.modules()):
            raise QuantizationError(f"{name} has an adapter of PEFT; model = model.merge_and_unload() first")
        if not all(parameter.isfinite().all() for parameter in layer.parameters()):
            raise QuantizationError(f"{name} has weights that are NaN or infinite, which 8 bits would hide")
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLinear)}
    form = STORAGES[storage].in_8_bits or STORAGES[storage]
    made: dict[str, CompressedLinear] = {}
    if form.rounded_except is not None and importances is not None:
        wide = _costliest(low_rank, importances)
        made |= {name: form.rounded_except(layer, *wide[name]) for name, layer in low_rank.items()}
    elif form.rounded is not None:
        made |= {name: form.rounded(layer) for name, layer in low_rank.items()}
    if form.rounded_dense is not None:
        dense = {name: layer for name, layer in layers.items() if isinstance(layer, Dense)}
        made |= {name: form.rounded_dense(layer) for name, layer in dense.items()}
    for name, new in made.items():
        old = layers[name]
        if not isinstance(new, CompressedLinear) or shape_of(new) != shape_of(old) or _rank(new) != _rank(old):
            raise QuantizationError(
                f"storage {storage!r} turned {name} {shape_of(old)} of rank {_rank(old)} into {new!r}, but must return "
                "a CompressedLinear of the same shape and rank"
            )
        if not all(value.isfinite().all() for value in new.state_dict().values()):
            raise QuantizationError(f"{name} has entries that float16 cannot hold beside others; use storage='factors'")
        carry_hooks(new, old)
    return made


def _rank(layer: nn.Module) -> int | None:
    return getattr(layer, "rank", None)


def rounding_costs(layer: LowRankLinear, found: Importance) -> tuple[Tensor, Tensor]:
    """Return the predicted cost of storing each row of `up` (m,) and each column of `down` (n,) in 8 bits.

    To second order, an error E of W costs `1/2 sum_i B_i E_i A E_i^T`, where B_i is the importance of output i. A row e
    of errors in `up` costs `B_i sum_c e_c^2 s_c`, where s are the squared norms of the columns of `up`, because the
    factors of a whitened SVD satisfy `down A down^T = diag(s)`. After training this holds approximately. A column e of
    errors in `down` at input j costs `A_jj sum_c e_c^2 sum_i B_i up_ic^2`. Loss-aware remapping is an idea of IO-SVD
    (arXiv 2605.15626).
    """
    up, down = layer.up.weight.detach().float(), layer.down.weight.detach().float()
    stored_up, stored_down = round_all(layer).factors()
    shift, _ = balance(up, down)
    up_error, down_error = stored_up / shift - up, stored_down * shift[:, None] - down
    outputs, inputs = found.outputs.to(up), found.inputs.to(up)
    rows = outputs * (up_error.square() @ up.square().sum(0))
    columns = inputs * ((outputs @ up.square()) @ down_error.square())
    return rows, columns


def _costliest(
    layers: Mapping[str, LowRankLinear], importances: Mapping[str, Importance]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the rows and columns to leave in 16 bits: those that save the most predicted cost per parameter.

    They contain at most as many parameters as `round_all_but_last` leaves in 16 bits.
    """
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
