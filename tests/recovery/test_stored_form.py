"""Layers of pivots that train as factors: the same function there and back, in the same size."""

import pytest
import torch
from torch import nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.pivots import choose_pivots
from zssvd_lightning.recovery.stored_form import factors_of, pivots_of

FORMS = [PivotedLinear, ColumnPivotedLinear]


def layer(form, ordered, bias=True, k=4):
    torch.manual_seed(0)
    up, down = torch.randn(10, k, dtype=torch.float64), torch.randn(k, 12, dtype=torch.float64)
    b = torch.randn(10, dtype=torch.float64) if bias else None
    return form.from_factors(up, down, b, None if ordered else choose_pivots(form.basis(up, down)).order)


def back(factors, like):
    return pivots_of(
        factors, type(like), ordered=like.spec.get("ordered", True), whole=torch.Tensor.detach, team=Team()
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_way_there_and_back_keeps_function_form_and_size(form, ordered, bias):
    one, x = layer(form, ordered, bias), torch.randn(5, 12, dtype=torch.float64)
    factors = factors_of(one)
    assert type(factors) is LowRankLinear
    assert factors.rank == one.rank
    torch.testing.assert_close(factors(x), one(x))
    torch.testing.assert_close(factors.up.weight.norm(dim=0), factors.down.weight.norm(dim=1))
    with torch.no_grad():
        factors.up.weight.add_(0.1 * torch.randn_like(factors.up.weight))
    again = back(factors, one)
    assert again.spec == one.spec
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in one.state_dict().items()}
    torch.testing.assert_close(again(x), factors(x))


@pytest.mark.parametrize("form", FORMS)
def test_pivots_are_chosen_anew_where_the_first_ones_no_longer_span_the_others(form):
    one, x = layer(form, ordered=False), torch.randn(5, 12, dtype=torch.float64)
    factors = factors_of(one)
    with torch.no_grad():
        weight = factors.up.weight if form is PivotedLinear else factors.down.weight.T
        weight[1] = weight[0]
    again = back(factors, one)
    assert again.order is not None
    torch.testing.assert_close(again(x), factors(x))
    assert max(float(p.abs().max()) for n, p in again.named_parameters() if n.split(".")[0] in ("others", "mixing")) < 2


def test_hooks_and_flags_stay():
    one, seen = layer(PivotedLinear, ordered=True), []
    one.register_forward_hook(lambda *_: seen.append(1))
    one.bias.requires_grad_(False)
    one.eval()
    again = back(factors_of(one), one)
    again(torch.randn(2, 12, dtype=torch.float64))
    assert seen == [1]
    assert not again.training
    assert not again.bias.requires_grad
    assert all(isinstance(part, nn.Linear) for part in again.children())
