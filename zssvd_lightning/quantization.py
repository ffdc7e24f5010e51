"""8 bits: the forms in which `remap` and `hq` keep layers, and which rows of the factors stay in 16 bits.

Shapes: W (m, n), up (m, k), down (k, n). Rounding is that of the factors as they are stored, after un-whitening.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zssvd_lightning.adapters import merge_adapters
from zssvd_lightning.eight_bit import LARGEST_CODE, EightBitLinear, Int8Linear, Int8LowRankLinear, balance
from zssvd_lightning.errors import QuantizationError, TargetError
from zssvd_lightning.hub import mark
from zssvd_lightning.modules import CompressedLinear, Dense, LowRankLinear, carry_hooks, shape_of
from zssvd_lightning.pivoted import PivotedLinear
from zssvd_lightning.spectrum import Spectrum
from zssvd_lightning.targets import find_targets, replace_module
from zssvd_lightning.whitening import Whitening, in_float64

EIGHT_BIT = ("remap", "hq", "mixed")
"""Storages with layers in 8 bits: the low-rank ones, all of them, or those that a rule has chosen."""


class Importance(NamedTuple):
    """What the loss makes of errors in a layer, up to a factor that all layers share."""

    outputs: Tensor
    """(m,): second derivative of the loss by an output, estimated; see `importance`."""
    inputs: Tensor
    """(n,): mean square of an input."""


def importance(mean_squares: Tensor, H: Tensor) -> Importance:
    """Importance of a layer's outputs and inputs, from what calibration has gathered.

    The mean gradient of T tokens is `G = 1/T sum d x^T`. At a minimum, where d has mean 0, row i of `H = G L^-T` has
    the expected square `n/T E[d_i^2]`, whatever the inputs are; `E[d_i^2]` is the diagonal of the Fisher information.

    Args:
        mean_squares: of the inputs (n,), the diagonal of their second moment.
        H: mean gradient in coordinates where the input is white (m, n).
    """
    return Importance(H.square().mean(1), mean_squares)


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


def is_in_8_bits(storage: str, rank: int | None) -> bool:
    """Whether a layer of that rank, None being dense, is in 8 bits with that storage, whatever a rule chooses."""
    return storage == "hq" or (storage == "remap" and rank is not None)


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


def rounding_by_component(spectrum: Spectrum, whitening: Whitening) -> Tensor:
    """What keeping each component (r,) in 8 bits is predicted to cost, as half a squared singular value does.

    Entries of the two sides of a component, `u (m,)` and `v (n,)`, get independent errors of variance `step^2 / 12`,
    with steps of a 127th of the largest. In the metric, whitened sides have the squared norm sigma, so that it costs
    `sigma / 24 (step_u^2 tr B + step_v^2 tr A)`.
    """
    up, down = spectrum.factors(torch.arange(len(spectrum.sigma), device=spectrum.sigma.device))
    up_steps, down_steps = up.abs().amax(0) / LARGEST_CODE, down.abs().amax(1) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(up)).sum(), whitening.inputs.diagonal(down.shape[1]).sum()
    costs: Tensor = spectrum.sigma / 24 * (up_steps.square() * B.to(up) + down_steps.square() * A.to(up))
    return costs


def rounding_of_dense(W: Tensor, whitening: Whitening) -> float:
    """What it is predicted to cost to keep a dense weight in 8 bits, with a step a row.

    That is `tr A / 24 sum_i step_i^2 B_ii`.
    """
    steps = in_float64(W.abs().amax(1)) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(W)).to(steps), whitening.inputs.diagonal(W.shape[1]).sum()
    return float(A.to(steps) / 24 * (steps.square() * B).sum())


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
