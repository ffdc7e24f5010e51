"""Operations whose gradients are written once: against plain products, by autograd and finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from zssvd_lightning.layers import pivoted
from zssvd_lightning.layers.gradients import narrowed, permuted, widened
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear


@pytest.fixture(autouse=True)
def _written_once(monkeypatch):
    """Small outputs are written into one tensor, as large ones are."""
    monkeypatch.setattr(pivoted, "FEW", 0)


ORDER = torch.tensor([3, 0, 4, 6, 2, 5, 1], dtype=torch.int32)

OPERATIONS = {
    "permuted": (lambda x: permuted(x, ORDER), lambda x: x[..., ORDER.long()], [(2, 7)]),
    "permuted, three axes": (lambda x: permuted(x, ORDER), lambda x: x[..., ORDER.long()], [(2, 3, 7)]),
    "widened": (widened, lambda z, C: torch.cat([z, z @ C.T], 1), [(4, 3), (2, 3)]),
    "narrowed": (narrowed, lambda x, C: x[:, : len(C)] + x[:, len(C) :] @ C.T, [(4, 5), (3, 2)]),
}
"""Operation, what it computes, and the shapes of its arguments."""


def values(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_all_orders_are_those_of_the_formula(name):
    found, plain, shapes = OPERATIONS[name]
    given = values(shapes)
    torch.testing.assert_close(found(*given), plain(*given))
    g = torch.randn_like(plain(*given))
    mine, theirs = (torch.autograd.grad(each(*given), given, g) for each in (found, plain))
    torch.testing.assert_close(mine, theirs)
    assert gradcheck(found, given, check_batched_grad=True)
    assert gradgradcheck(lambda *x: found(*x).pow(2), given)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_gradient_is_computed_for_what_needs_none(name):
    found, _, shapes = OPERATIONS[name]
    for index in range(len(shapes)):
        given = values(shapes)
        for other in given[:index] + given[index + 1 :]:
            other.requires_grad_(False)
        found(*given).sum().backward()
        assert [each.grad is not None for each in given] == [at == index for at in range(len(given))]


def test_the_gradient_of_a_permutation_gathers():
    x = torch.randn(2, 7, requires_grad=True)
    with torch.profiler.profile() as profile:
        permuted(x, ORDER).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in names
    assert not {"aten::index_add", "aten::index_add_", "aten::scatter_add_"} & names


LAYERS = {
    "rows": lambda: PivotedLinear.from_factors(torch.randn(7, 3), torch.randn(3, 5), torch.randn(7)),
    "all rows": lambda: PivotedLinear.from_factors(torch.randn(3, 3), torch.randn(3, 5), torch.randn(3)),
    "columns": lambda: ColumnPivotedLinear.from_factors(torch.randn(7, 3), torch.randn(3, 5), torch.randn(7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_gradients_of_its_dense_product_however_it_runs(name):
    layer, x = LAYERS[name]().double(), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    given = [x, *layer.parameters()]
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    g = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, given, g)
    assert gradcheck(lambda _, *parameters: layer(x), given)
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(run(x), given, g), expected)
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    _, pull = torch.func.vjp(output, *given)
    torch.testing.assert_close(pull(g), expected)
    _, pushed = torch.func.jvp(output, tuple(given), tuple(torch.ones_like(each) for each in given))
    along = sum((each * torch.ones_like(each)).sum() for each in expected)
    torch.testing.assert_close((pushed * g).sum(), along)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close((tangent * g).sum(), expected[0].sum())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_under_autocast_are_near_those_without(name):
    layer, x = LAYERS[name](), torch.randn(4, 5)
    exact = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().square().sum()
    for found, expected in zip(torch.autograd.grad(loss, list(layer.parameters())), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
