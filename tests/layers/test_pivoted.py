"""Pivot rows and coefficients: the function of two factors, in fewer numbers."""

import copy
import importlib.util
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import assert_same_state, logits, state_of, tiny_gpt2, tiny_llama, token_batches
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from zssvd_lightning import (
    CompressionConfig,
    LowRankLinear,
    compress,
    from_pretrained,
    merge,
    quantize,
    save_pretrained,
)
from zssvd_lightning.decomposition.decompose import Decomposition
from zssvd_lightning.decomposition.factors import Factors, TruncatedWeights, pivoted_layer
from zssvd_lightning.distributed import LayerSet, Team
from zssvd_lightning.errors import CheckpointError, ConfigError, NonFiniteError, QuantizationError
from zssvd_lightning.layers import pivoted, pivots
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.pivots import BOUND, Pivots, choose_pivots, coefficients, pivots_first
from zssvd_lightning.layers.registry import KINDS, dense_like, form_for, layer_like
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Target, find_targets
from zssvd_lightning.recovery.methods import FactorRecovery, LoRARecovery, SingularValueRecovery
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.serialization.specs import ranks_of, rebuild, specs_of
from zssvd_lightning.serialization.state_dict import match_structure
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.whitening.spectrum import Spectrum

SHAPES = [(6, 9, 1), (6, 9, 5), (6, 9, 6), (9, 6, 5), (9, 6, 6), (7, 7, 3), (8, 5, 4)]
"""(m, n, k), full rank among them."""


FORMS = [PivotedLinear, ColumnPivotedLinear]


@pytest.fixture(autouse=True)
def _written_once(monkeypatch):
    """Small outputs are written into one tensor, as large ones are."""
    monkeypatch.setattr(pivoted, "FEW", 0)


def made(form, up, down, bias, ordered=True):
    """A layer of factors, and the weight and bias that it has to stand for."""
    if ordered:
        return form.from_factors(up, down, bias), up @ down, bias
    order, W = pivots_first(form.basis(up, down)), up @ down
    layer = form.from_factors(up, down, bias, order)
    if form is PivotedLinear:
        return layer, W[order], None if bias is None else bias[order]
    return layer, W[:, order], bias


def factors(m, n, k, decay=0.0, dtype=torch.float64):
    """Of a matrix whose singular values fall to `10^-decay` of the largest, scaled alike on both sides."""
    U, V = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64)).Q for size in (m, n))
    S = torch.logspace(0, -decay, k, dtype=torch.float64).sqrt()
    return (U * S).to(dtype), (V * S).T.to(dtype)


def truncated(target, k):
    U, S, Vh = torch.linalg.svd(target.weight.float(), full_matrices=False)
    return Factors(U[:, :k] * S[:k].sqrt(), S[:k].sqrt()[:, None] * Vh[:k])


def pivoted_model(build=tiny_llama, dtype=torch.float32):
    """A model whose layers are pivoted, of different ranks, full ones among them."""
    model = AutoModelForCausalLM.from_config(build().config, dtype=dtype).eval()  # .to rounds rotary frequencies
    for index, target in enumerate(find_targets(model).values()):
        found, form = truncated(target, min(target.shape) - (0, 7, 15)[index % 3]), form_for("pivoted", *target.shape)
        new = pivoted_layer(target.module, found, target.module.bias, choose_pivots(form.basis(*found)), form)
        replace_module(model, target.module, new)
    mark(model)
    return model


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_it_computes_what_the_factors_do_in_fewer_numbers(m, n, k, form, bias, ordered):
    up, down = factors(m, n, k)
    layer, W, b = made(form, up, down, torch.randn(m, dtype=torch.float64) if bias else None, ordered)
    for shape in ((), (3,), (3, 4), (0,), (2, 0)):
        x = torch.randn(*shape, n, dtype=torch.float64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, W, b))
        with torch.no_grad():  # written into one output
            torch.testing.assert_close(layer(x), nn.functional.linear(x, W, b))
            turned = x.expand(2, *x.shape).transpose(0, -2) if shape else x
            torch.testing.assert_close(layer(turned), nn.functional.linear(turned, W, b))
    torch.testing.assert_close(layer.weight, W)
    assert sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name) == k * (m + n - k)
    assert (layer.bias is not None) == bias
    assert (layer.in_features, layer.out_features, layer.rank) == (n, m, k)
    assert layer.spec == {"kind": form.kind, "rank": k} | ({} if ordered else {"ordered": False})
    assert all(p.requires_grad for p in layer.parameters())
    assert f"rank={k}" in repr(layer)
    weights = {f"a.{name}": value for name, value in layer.state_dict().items()}
    found = {kind: each.found_in(weights, "a") for kind, each in KINDS.items()}
    assert {kind: sizes for kind, sizes in found.items() if sizes is not None} == {
        form.kind: {key: value for key, value in layer.spec.items() if key != "kind"}
    }
    again = layer_like(nn.Linear(n, m, bias), layer.spec).to_empty(device="cpu").double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


def test_weights_written_before_load_as_pivot_rows():
    """Names and shapes of the first releases."""
    weights = {
        "0.pivots.weight": torch.eye(2, 3),
        "0.others.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "0.bias": torch.tensor([1.0, 0.0, 0.0, 2.0]),
        "0.order": torch.tensor([2, 0, 1, 3], dtype=torch.int32),
    }
    model = nn.Sequential(nn.Linear(3, 4))
    match_structure(model, weights)
    model.load_state_dict(weights)
    assert specs_of(model) == {"0": {"kind": "pivoted", "rank": 2}}
    W = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 4.0, 0.0]])
    torch.testing.assert_close(model[0].weight, W)
    torch.testing.assert_close(model(torch.eye(3)), W.T + weights["0.bias"])


@pytest.mark.parametrize("form", FORMS)
def test_any_order_that_spans_the_weight_can_be_asked_for(form):
    up, down = factors(8, 9, 3)
    basis = form.basis(up, down)
    order = torch.randperm(len(basis))
    layer = form.from_factors(up, down, None, order)
    torch.testing.assert_close(layer.weight, (up @ down)[order] if form is PivotedLinear else (up @ down)[:, order])
    ordered = form(9, 8, 3, bias=False, dtype=torch.float64)
    ordered.fill(up, down, None, order)
    torch.testing.assert_close(ordered.weight, up @ down)
    with pytest.raises(ValueError, match=r"rank=3, ordered=False\) has no order of its own"):
        layer.fill(up, down, None)
    with pytest.raises(ValueError, match="is no permutation of 0 to"):
        layer.fill(up, down, None, order.clamp(max=3))


@pytest.mark.parametrize(("m", "n", "kind"), [(6, 9, "pivoted"), (9, 6, "pivoted_columns"), (6, 6, "pivoted_columns")])
def test_the_shorter_side_is_put_in_order(m, n, kind):
    held = TruncatedWeights(LayerSet({"a": Target("a", nn.Linear(n, m))}), "pivoted")
    held.held["a"] = Factors(torch.randn(m, 2), torch.randn(2, n))
    layer = held.layer("a")
    assert layer.spec == {"kind": kind, "rank": 2}
    torch.testing.assert_close(layer.weight, held.held["a"].up @ held.held["a"].down)
    assert layer.order.nbytes == STORAGES["pivoted"].low_rank(m, n, 2).beside


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), share=st.floats(0, 1), decay=st.floats(0, 6))
def test_any_shape_rank_and_spectrum(m, n, share, decay):
    up, down = factors(m, n, max(1, round(share * min(m, n))), decay)
    for form in FORMS:
        torch.testing.assert_close(form.from_factors(up, down, None).weight, up @ down, rtol=1e-9, atol=1e-9)


def test_pivots_are_rows_of_the_matrix():
    up, down = factors(10, 12, 4)
    layer = PivotedLinear.from_factors(up, down, None)
    torch.testing.assert_close((up @ down)[layer.order < 4], layer.pivots.weight[layer.order[layer.order < 4].long()])


def test_pivot_columns_are_columns_of_the_matrix():
    up, down = factors(10, 12, 4)
    layer = ColumnPivotedLinear.from_factors(up, down, None)
    torch.testing.assert_close((up @ down)[:, layer.order[:4].long()], layer.columns.weight)


def test_the_pivots_are_as_good_as_the_best_of_all():
    """No exchange of one pivot increases the volume by more than the bound, which bounds all coefficients."""
    up, _ = factors(9, 8, 3, decay=1)
    found = choose_pivots(up)
    order, k = found.order, 3
    volume = up[order[:k]].det().abs()
    for i in range(k):
        for other in order[k:]:
            tried = order[:k].clone()
            tried[i] = other
            assert up[tried].det().abs() <= BOUND * volume * (1 + 1e-9)
    assert found.coefficients.abs().max() <= BOUND
    best = max(up[list(rows)].det().abs() for rows in itertools.combinations(range(9), k))
    assert volume >= best / BOUND**k / k ** (k / 2)  # (Goreinov et al., 2010)


@pytest.mark.parametrize("decay", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("candidates", [3, 128])
def test_coefficients_are_bounded(monkeypatch, candidates, decay):
    monkeypatch.setattr(pivots, "CANDIDATES", candidates)
    up, _ = factors(200, 200, 80, decay)
    order, C = choose_pivots(up)
    assert C.abs().max() <= BOUND
    assert C.norm(dim=1).mean() < 4
    scaled = up / up.norm(dim=0)
    torch.testing.assert_close(C @ scaled[order[:80]], scaled[order[80:]], rtol=0, atol=1e-12)
    torch.testing.assert_close(coefficients(up, order), C)
    assert sorted(order.tolist()) == list(range(200))
    again = choose_pivots(up)
    assert torch.equal(again.order, order)
    assert torch.equal(again.coefficients, C)


def test_scales_of_components_do_not_matter():
    up, _ = factors(30, 20, 8)
    found, other = choose_pivots(up), choose_pivots(up * 10.0 ** torch.arange(-12, 4, 2))
    assert torch.equal(found.order, other.order)
    torch.testing.assert_close(found.coefficients, other.coefficients)


def test_elimination_alone_leaves_coefficients_that_exchanges_bound():
    """The matrix whose coefficients grow as `2^(k - 1)` under elimination with row pivoting."""
    k = 12
    up = torch.cat([torch.eye(k) - torch.ones(k, k).tril(-1), -torch.ones(3, k)]).double()
    assert pivots._eliminated(up)[1].abs().max() > 1000
    order, C = choose_pivots(up)
    assert C.abs().max() <= BOUND
    torch.testing.assert_close(C @ up[order[:k]], up[order[k:]])


def test_a_limit_of_exchanges_is_told(monkeypatch, caplog):
    monkeypatch.setattr(pivots, "EXCHANGES", 1 / 12)
    up = torch.cat([torch.eye(12) - torch.ones(12, 12).tril(-1), torch.randn(20, 12)]).double()
    order, C = choose_pivots(up)
    assert "exchange of pivots stopped with coefficients of up to" in caplog.text
    torch.testing.assert_close(C @ up[order[:12]], up[order[12:]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", [1, 3, 5])
def test_factors_of_less_than_full_column_rank_give_the_same_matrix(missing, form):
    up, down = factors(9, 8, 5)
    if form is ColumnPivotedLinear:
        up, down = down.T.contiguous(), up.T.contiguous()
    basis = form.basis(up, down)
    basis[:, 5 - missing :] = basis[:, : min(missing, 5 - missing)].sum(1, keepdim=True)  # nothing new, or 0
    order, C = choose_pivots(basis)
    assert (C != 0).any(0).sum() == 5 - missing
    assert C.abs().max() <= BOUND
    torch.testing.assert_close(form.from_factors(up, down, None).weight, up @ down)
    torch.testing.assert_close(coefficients(basis, order) @ basis[order[:5]], basis[order[5:]])


def test_pivots_that_do_not_span_the_weight_are_refused():
    up, down = factors(6, 5, 2)
    up[1] = 2 * up[0]
    with pytest.raises(ValueError, match="the first 2 rows of the order have rank 1 and do not span the others"):
        PivotedLinear.from_factors(up, down, None, torch.arange(6))
    up[2:] = up[0]
    torch.testing.assert_close(PivotedLinear.from_factors(up, down, None, torch.arange(6)).weight, up @ down)


@pytest.mark.parametrize("decay", [0.0, 2.0, 4.0])
def test_rounding_to_bfloat16_costs_little_more_than_that_of_factors(decay):
    up, down = factors(192, 160, 100, decay)
    x = torch.randn(64, 160, dtype=torch.float64)
    expected = x @ (up @ down).T
    found = {
        form: error(form.from_factors(up, down, None).bfloat16()(x.bfloat16()).detach(), expected)
        for form in (LowRankLinear, *FORMS)
    }
    assert max(found[form] for form in FORMS) < 2.5 * found[LowRankLinear]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form, ordered):
    layer, *_ = made(form, *factors(6, 5, 3), torch.randn(6, dtype=torch.float64), ordered)
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, *values))
    g = torch.randn(2, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(found, g @ layer.weight.detach())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_layers_run_alike_however_they_are_called(form, ordered):
    layer, W, b = made(form, *factors(6, 5, 3, dtype=torch.float32), torch.randn(6), ordered)
    x, alike = torch.randn(2, 4, 5), {"rtol": 1e-5, "atol": 1e-5}
    expected = nn.functional.linear(x, W, b)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            torch.testing.assert_close(compiled(x), expected, **alike)
            torch.testing.assert_close(layer(x), expected, **alike)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), expected, **alike)
        torch.testing.assert_close(torch.jit.trace(layer, x)(x[:1]), expected[:1], **alike)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected, **alike)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("ordered", [True, False])
def test_few_outputs_are_concatenated_to_the_same_values(ordered, monkeypatch):
    layer, *_ = made(PivotedLinear, *factors(6, 5, 3), torch.randn(6, dtype=torch.float64), ordered)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            monkeypatch.setattr(pivoted, "FEW", 8 * 6 - 1)
            assert layer._can_write_once(x)
            written = layer(x)
            monkeypatch.setattr(pivoted, "FEW", 8 * 6)
            assert not layer._can_write_once(x)
            torch.testing.assert_close(layer(x), written)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_of_thin_layers_are_called(form):
    layer, seen = form.from_factors(*factors(6, 5, 3), None), []
    for part in layer.children():
        part.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        layer(torch.randn(2, 5, dtype=torch.float64))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_types_are_as_exact_as_they_can_be(form, dtype):
    up, down = factors(40, 30, 12, decay=1)
    layer, x = form.from_factors(up, down, torch.randn(40, dtype=torch.float64)).to(dtype), torch.randn(9, 30).to(dtype)
    wide = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        assert error(layer(x), wide) < 4 * torch.finfo(dtype).eps
    assert error(layer(x), wide) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
def test_types_are_cast_but_for_the_order(form):
    layer = form.from_factors(*factors(6, 5, 3), None)
    for dtype in (torch.bfloat16, torch.float32):
        assert {p.dtype for p in layer.to(dtype).parameters()} == {dtype}
        assert layer.order.dtype == torch.int32
        assert layer(torch.randn(2, 5, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 5)).dtype == torch.bfloat16


def test_building_in_bfloat16_is_rounded_once():
    up, down = factors(40, 30, 12, decay=1, dtype=torch.bfloat16)
    layer = PivotedLinear.from_factors(up, down, None)
    assert layer.pivots.weight.dtype == torch.bfloat16
    wide = PivotedLinear.from_factors(up.double(), down.double(), None)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[name].to(value.dtype), rtol=2**-7, atol=0)


@pytest.mark.parametrize("old", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Conv1D(6, 8)], ids=repr)
def test_the_layer_it_replaces_lives_on_in_it(old):
    old = copy.deepcopy(old).eval()
    old.weight.requires_grad_(False)
    seen = []
    handle = old.register_forward_hook(lambda *_: seen.append(1))
    held = TruncatedWeights(LayerSet({"a": Target("a", old)}), "pivoted")
    held.held["a"] = truncated(Target("a", old), 6)
    new, x = held.layer("a"), torch.randn(3, 8)
    assert isinstance(new, PivotedLinear)
    with torch.no_grad():
        torch.testing.assert_close(new(x), old(x), atol=1e-5, rtol=1e-4)
    assert len(seen) == 2
    handle.remove()
    new(x)
    assert len(seen) == 2
    assert not new.training
    assert {n: p.requires_grad for n, p in new.named_parameters()} == {"pivots.weight": False} | (
        {} if old.bias is None else {"bias": True}
    )
    assert type(dense_like(new)) is type(old)
    assert dense_like(new).weight.shape == old.weight.shape
    back = layer_like(new, {"kind": "low_rank", "rank": 2})
    assert not back.down.weight.requires_grad
    assert back.transposed == new.transposed == isinstance(old, Conv1D)


def test_other_storages_are_made_of_factors():
    held = TruncatedWeights(LayerSet({"a": Target("a", nn.Linear(8, 6))}), "remap")
    held.held["a"] = Factors(torch.randn(6, 2), torch.randn(2, 8))
    assert isinstance(held.layer("a"), LowRankLinear)


def test_the_first_process_chooses_the_rows():
    class Other(Team):
        def decide_on_first(self, choose):
            order = choose().order.flip(0)
            return Pivots(order, coefficients(up, order))

    up = torch.randn(6, 2)

    held = TruncatedWeights(LayerSet({"a": Target("a", nn.Linear(8, 6))}, Other()), "pivoted")
    held.held["a"] = Factors(up, torch.randn(2, 8))
    layer = held.layer("a")
    assert layer.order.tolist() == pivots_first(up).flip(0).argsort().tolist()
    torch.testing.assert_close(layer.weight, held.held["a"].up @ held.held["a"].down)


def taken(m, n, k, dtype, storage):
    """Held factors of one layer `a`, taken from its spectrum, and their product in float64."""
    left, right = factors(m, n, k, decay=1, dtype=torch.float32)
    found = Decomposition({"a": 0}, {"a": Spectrum(left, torch.ones(k), right)}, {}, {})
    held = TruncatedWeights(LayerSet({"a": Target("a", nn.Linear(n, m, dtype=dtype))}), storage)
    held.take(found, "a", torch.arange(k))
    return held, left.double() @ right.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "form"), [(100, 120, PivotedLinear), (120, 100, ColumnPivotedLinear)])
def test_pivots_and_coefficients_of_a_narrow_model_are_rounded_once(m, n, form, dtype):
    held, W = taken(m, n, 60, dtype, "pivoted")
    layer = held.layer("a")
    assert type(layer) is form
    assert {p.dtype for p in layer.parameters()} == {dtype}
    up, down = (factor.double() for factor in held.held["a"])
    once = form.from_factors(up, down, None).to(dtype)
    rounded = form.from_factors(*Factors(up, down).to(torch.empty(0, dtype=dtype)), None)
    found, best, twice = (error(x.double().weight, W) for x in (layer, once, rounded))
    assert found < 1.01 * best
    assert twice > 1.1 * best


def test_factors_are_as_wide_as_their_storage_needs():
    for storage, wide in (("pivoted", torch.float32), ("factors", torch.bfloat16), ("remap", torch.bfloat16)):
        held, W = taken(12, 10, 6, torch.bfloat16, storage)
        again = TruncatedWeights(LayerSet({"a": Target("a", nn.Linear(10, 12, dtype=torch.bfloat16))}), storage)
        again.load_state_dict(held.state_dict())
        for each in (held, again):
            assert {factor.dtype for factor in each.held["a"]} == {wide}
            assert torch.equal(each.held["a"].up, held.held["a"].up)
        assert held.truncated("a").dtype == torch.bfloat16
        torch.testing.assert_close(held.truncated("a").double(), W, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_layers_are_made_alike_under_autocast(storage):
    held, _ = taken(12, 10, 6, torch.float32, storage)
    layer, weight = held.layer("a"), held.truncated("a")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_state(state_of(layer), state_of(held.layer("a")))
        assert torch.equal(held.truncated("a"), weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq", "mixed"])
def test_factors_that_are_not_finite_are_refused_before_any_layer_is_made(storage, value):
    held = TruncatedWeights(LayerSet({name: Target(name, nn.Linear(8, 6)) for name in "ab"}), storage)
    for name in "ab":
        held.held[name] = Factors(torch.randn(6, 2), torch.randn(2, 8))
    held.held["b"].down[1, 3] = value
    with pytest.raises(NonFiniteError, match=r"factors of b \(6, 8\) hold NaN or infinite values in float32; compress"):
        held.layer("a")


@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap"])
def test_a_model_whose_factors_are_not_finite_stays_as_it_is(storage, monkeypatch):
    model, factors_of = tiny_llama(), Spectrum.factors
    before = state_of(model)

    def overflowing(spectrum, kept):
        up, down = factors_of(spectrum, kept)
        return up * torch.inf, down

    monkeypatch.setattr(Spectrum, "factors", overflowing)
    config = CompressionConfig(prune_ratio=0.4, corrections=0, storage=storage)
    with pytest.raises(NonFiniteError, match=r"proj .* hold NaN or infinite values"):
        compress(model, token_batches(), config, progress=False)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_model_follows_weights_to_pivots_and_back(build):
    dense, compressed = build().eval(), pivoted_model(build)
    model = copy.deepcopy(dense)
    match_structure(model, compressed.state_dict())
    model.load_state_dict(compressed.state_dict())
    assert specs_of(model) == specs_of(compressed)
    assert ranks_of(model) == ranks_of(compressed)
    assert_same_state(state_of(compressed), state_of(model))
    match_structure(model, dense.state_dict())
    model.load_state_dict(dense.state_dict())
    assert_same_state(state_of(dense), state_of(model))


def test_weights_of_other_shapes_are_refused():
    model, weights = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(PivotedLinear(9, 6, 3)).state_dict()
    with pytest.raises(CheckpointError, match=r"0 is \(6, 8\) in the model, so that its pivots.weight is \(3, 8\)"):
        match_structure(model, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_saved_model_comes_back_and_is_merged(tmp_path, build, dtype):
    model = pivoted_model(build, dtype)
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert specs_of(again) == specs_of(model)
    assert "pivot rows" in (tmp_path / "m" / "README.md").read_text()
    merge(again)
    assert not specs_of(again)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in build().named_parameters()}
    exact = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(logits(again), logits(model), **exact)


def test_a_folder_carries_the_code_of_all_forms(tmp_path, monkeypatch):
    monkeypatch.undo()  # both copies of the code then write outputs in the same way
    model = pivoted_model()
    save_pretrained(model, tmp_path / "m", self_contained=True)
    assert not [path for path in (tmp_path / "m").glob("*.py") if "from zssvd_lightning" in path.read_text()]
    (tmp_path / "m" / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("carried", tmp_path / "m" / "__init__.py")
    monkeypatch.setitem(sys.modules, "carried", importlib.util.module_from_spec(spec))
    modeling = importlib.import_module("carried.modeling_zssvd")
    config = modeling.CompressedLlamaConfig.from_pretrained(tmp_path / "m")
    rebuilt = modeling.CompressedLlamaForCausalLM(config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(logits(rebuilt), logits(model))
    for name in [name for name in sys.modules if name.startswith("carried.")]:
        monkeypatch.delitem(sys.modules, name)


def test_configs_with_ranks_there_cannot_be_are_refused():
    with pytest.raises(Exception, match="which is no such layer"):
        rebuild(nn.Sequential(nn.Linear(8, 6)), {"0": {"kind": "pivoted", "rank": 7}})


@pytest.mark.parametrize("form", FORMS)
def test_recovery_trains_pivots_and_coefficients(form):
    layer = form.from_factors(*factors(6, 5, 3), torch.randn(6, dtype=torch.float64))
    names = [name for name, _ in layer.named_parameters()]
    both, one_by_one = FactorRecovery(), FactorRecovery(two_step=True)
    both.refuse_storage("pivoted")
    assert all(both.trains(name, both.stages[0]) for name in names)
    first, second = ({n for n in names if one_by_one.trains(n, stage)} for stage in one_by_one.stages)
    assert first | second == set(names)
    assert second == {f"{layer.thin['down']}.weight"}
    before = copy.deepcopy(layer.state_dict())
    both.prepare(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_recovery_that_acts_on_components_is_refused():
    for recovery in (LoRARecovery(rank=2), SingularValueRecovery()):
        recovery.refuse_storage("factors")
    LoRARecovery(rank=2).refuse_storage("pivoted")
    with pytest.raises(ConfigError, match=r"'singular_values' acts on single components.*recover by 'lora'"):
        SingularValueRecovery().refuse_storage("pivoted")


def test_training_changes_all_of_it():
    layer, target = PivotedLinear.from_factors(*factors(6, 5, 3, dtype=torch.float32), None), torch.randn(32, 6)
    x = torch.randn(32, 5)
    before, optimizer, losses = copy.deepcopy(layer), torch.optim.Adam(layer.parameters(), lr=0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(*pair) for pair in zip(layer.parameters(), before.parameters(), strict=True))
    assert torch.equal(layer.order, before.order)


def test_pivoted_layers_are_not_put_into_8_bits():
    with pytest.raises(QuantizationError, match="q_proj is kept as pivot rows or columns"):
        quantize(pivoted_model())
