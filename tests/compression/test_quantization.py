import copy

import pytest
import torch
from support.models import FAMILIES, tiny_gpt2, tiny_llama, token_batches
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, quantize
from zssvd_lightning.compression.quantization import in_8_bits, rounding_costs
from zssvd_lightning.errors import BudgetError, QuantizationError
from zssvd_lightning.layers.int8 import EightBitLinear, Int8Linear, Int8LowRankLinear, bfloat16_scale, rounded
from zssvd_lightning.layers.registry import dense_like, layer_like
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.whitening.rounding import Importance, importance

WIDE = {
    "none": lambda size: torch.zeros(size, dtype=torch.bool),
    "last": lambda size: torch.arange(size) >= size - 3,
    "scattered": lambda size: torch.arange(size) % 3 == 0,
    "all": lambda size: torch.ones(size, dtype=torch.bool),
}


def low_rank(m=12, n=9, k=5, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    return LowRankLinear.from_factors(
        up * torch.logspace(0, -2, k), down, torch.randn(m, generator=g) if bias else None
    )


def shift_of(layer, wide_rows, wide_columns):
    """By how much `up` is larger once both sides of each component are scaled alike; `down` is by the inverse."""
    up, down = layer.up.weight.detach()[~wide_rows], layer.down.weight.detach()[:, ~wide_columns]
    largest_up = up.abs().amax(0) if len(up) else torch.ones(layer.rank)
    largest_down = down.abs().amax(1) if down.shape[1] else torch.ones(layer.rank)
    return (largest_down / largest_up).sqrt()


@pytest.mark.parametrize("columns", WIDE)
@pytest.mark.parametrize("rows", WIDE)
def test_an_8_bit_layer_computes_with_the_factors_it_stores(rows, columns):
    layer = low_rank()
    new = Int8LowRankLinear.of(layer, WIDE[rows](12), WIDE[columns](9))
    up, down = new.factors()
    x = torch.randn(4, 3, 9)
    torch.testing.assert_close(new(x), nn.functional.linear(x, up @ down, layer.bias))
    torch.testing.assert_close(new.weight, up @ down)
    assert new.up_codes.dtype == new.down_codes.dtype == torch.int8
    assert new.up_codes.shape == (12 - WIDE[rows](12).sum(), 5)
    assert new.down_codes.shape == (5, 9 - WIDE[columns](9).sum())


@pytest.mark.parametrize("columns", WIDE)
@pytest.mark.parametrize("rows", WIDE)
def test_entries_are_off_by_half_a_step_in_8_bits_and_by_float16_rounding_in_16(rows, columns):
    layer = low_rank()
    wide_rows, wide_columns = WIDE[rows](12), WIDE[columns](9)
    new = Int8LowRankLinear.of(layer, wide_rows, wide_columns)
    up, down = new.factors()
    shift = shift_of(layer, wide_rows, wide_columns)
    up_error, down_error = up / shift - layer.up.weight, down * shift[:, None] - layer.down.weight
    up_step = new.scale.float() / shift
    down_step = new.scale.float()[:, None] * shift[:, None]
    assert (up_error[~wide_rows].abs() <= up_step * 0.501).all()
    assert (down_error[:, ~wide_columns].abs() <= down_step * 0.501).all()
    torch.testing.assert_close((up / shift)[wide_rows], layer.up.weight[wide_rows], rtol=1e-3, atol=1e-6)


def test_both_sides_of_a_component_reach_the_largest_code():
    new = Int8LowRankLinear.of(low_rank(), WIDE["none"](12), WIDE["none"](9))
    assert (new.up_codes.abs().amax(0) >= 126).all()
    assert (new.down_codes.abs().amax(1) >= 126).all()


def test_a_component_of_nothing_stays_nothing():
    layer = low_rank(bias=False)
    with torch.no_grad():
        layer.up.weight[:, 2] = 0
        layer.down.weight[2] = 0
    new = Int8LowRankLinear.of(layer, WIDE["last"](12), WIDE["none"](9))
    assert new.weight.isfinite().all()
    assert not new.up_codes[:, 2].any()


@pytest.mark.parametrize("dense", [nn.Linear(9, 12), Conv1D(12, 9), nn.Linear(9, 12, bias=False)])
def test_a_dense_layer_in_8_bits_is_off_by_half_a_step_of_its_row(dense):
    W = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
    new = Int8Linear.of(dense)
    assert ((new.weight - W).abs() <= new.scale.float()[:, None] * 0.5001).all()
    x = torch.randn(2, 9)
    torch.testing.assert_close(new(x), nn.functional.linear(x, new.weight, dense.bias))
    assert new.transposed == isinstance(dense, Conv1D)


def test_scales_are_the_least_of_bfloat16_that_reach_the_largest_entry():
    largest = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 10 + 1e-6
    scale = bfloat16_scale(largest)
    assert (largest / scale.float() <= 127.0001).all()
    assert (largest / scale.float() > 127 * (1 - 2**-7)).all()
    assert torch.equal(bfloat16_scale(torch.zeros(3)).float(), torch.ones(3))
    assert rounded(largest, scale).max() == 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_what_is_stored(dtype):
    new = Int8LowRankLinear.of(low_rank(), WIDE["scattered"](12), WIDE["last"](9))
    before = {name: value.clone() for name, value in new.named_buffers()}
    nn.Module.to(new, dtype)
    assert all(torch.equal(before[name], value) for name, value in new.named_buffers())
    assert new.bias.dtype == dtype
    x = torch.randn(5, 9, dtype=dtype)
    assert new(x).dtype == dtype
    exact = nn.functional.linear(x.double(), new.weight.double(), new.bias.double())
    torch.testing.assert_close(new(x).double(), exact, atol=3e-2 if dtype == torch.bfloat16 else 5e-3, rtol=3e-2)


def test_specs_make_layers_of_the_same_shapes():
    new = Int8LowRankLinear.of(low_rank(), WIDE["scattered"](12), WIDE["last"](9))
    again = layer_like(nn.Linear(9, 12), new.spec)
    assert {n: (v.shape, v.dtype) for n, v in again.state_dict().items()} == {
        n: (v.shape, v.dtype) for n, v in new.state_dict().items()
    }
    assert Int8LowRankLinear.found_in({f"a.{n}": v for n, v in new.state_dict().items()}, "a") == {
        key: value for key, value in new.spec.items() if key != "kind"
    }


def test_wide_layers():
    layer = LowRankLinear(4, 40_000, 1)
    new = Int8LowRankLinear.of(layer, WIDE["scattered"](40_000), WIDE["none"](4))
    torch.testing.assert_close(new(torch.ones(4)), layer(torch.ones(4)), atol=1e-2, rtol=1e-2)


def stored_numbers(model):
    """16-bit numbers in the codes and factors of a model, scales and orders left out."""
    numbers = 0
    for module in model.modules():
        if isinstance(module, EightBitLinear):
            own = {n: b for n, b in module.named_buffers() if "codes" in n or "rest" in n}
            numbers += sum(b.numel() * b.element_size() for b in own.values()) / 2
    return numbers


@pytest.mark.parametrize("rows", ["last", "loss_aware"])
@pytest.mark.parametrize("family", FAMILIES)
def test_remap_stores_what_its_ratio_says(family, rows):
    build, batches, _ = FAMILIES[family]
    model = build()
    config = CompressionConfig(0.5, corrections=0, storage="remap", rows_in_16_bits=rows)
    report = compress(model, batches(), config, progress=False)
    assert 0.5 <= report.reached < 0.55
    kept = sum(layer.kept for layer in report.layers.values() if layer.rank is not None)
    assert stored_numbers(model) <= kept
    assert stored_numbers(model) >= kept - (0 if rows == "last" else 100)
    assert all(layer.kept == (layer.rank or min(layer.shape)) * max(layer.shape) for layer in report.layers.values())


def test_hq_prunes_half_as_much_and_has_everything_in_8_bits():
    model = tiny_llama()
    report = compress(model, token_batches(), CompressionConfig(0.6, corrections=0, storage="hq"), progress=False)
    assert 0.6 <= report.reached < 0.65
    factors = tiny_llama()
    same = compress(factors, token_batches(), CompressionConfig(0.2, corrections=0), progress=False)
    assert sum(r.kept for r in report.layers.values()) == pytest.approx(same.parameters_after / 2, rel=0.05)
    assert stored_numbers(model) == pytest.approx(report.parameters_after, abs=len(report.layers))
    assert not any(isinstance(model.get_submodule(name), nn.Linear) for name in report.layers)


def test_hq_by_itself_is_not_pruning():
    with pytest.raises(BudgetError, match=r"reached by storage 'hq' alone"):
        compress(tiny_llama(), token_batches(), CompressionConfig(0.5, corrections=0, storage="hq"), progress=False)


def test_a_compression_that_fails_while_storing_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("zssvd_lightning.compression.quantization.in_8_bits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(model, token_batches(), CompressionConfig(0.4, corrections=0, storage="remap"), progress=False)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_predicted_costs_are_those_of_the_error_in_the_metric_they_are_of():
    """Against a double sum over the whole second moment, for factors of a whitened SVD."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(200, 9, generator=g) @ torch.randn(9, 9, generator=g)
    A = X.T @ X / 200
    L = torch.linalg.cholesky(A)
    W, B = torch.randn(12, 9, generator=g), torch.rand(12, generator=g)
    U, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    up, down = (
        U[:, :5] * S[:5].sqrt(),
        S[:5].sqrt()[:, None] * torch.linalg.solve_triangular(L, Vh[:5], upper=False, left=False),
    )
    layer = LowRankLinear.from_factors(up, down, None)
    rows, columns = rounding_costs(layer, Importance(B, A.diagonal()))
    stored_up, stored_down = Int8LowRankLinear.of(layer, WIDE["none"](12), WIDE["none"](9)).factors()
    shift = (down.abs().amax(1) / up.abs().amax(0)).sqrt()
    by_rows = stored_up / shift @ down - up @ down
    torch.testing.assert_close(rows, B * (by_rows @ A * by_rows).sum(1), rtol=1e-3, atol=1e-9)
    by_columns = up @ (stored_down * shift[:, None]) - up @ down
    exact = A.diagonal() * (B[:, None] * by_columns.square()).sum(0)
    assert torch.corrcoef(torch.stack([columns, exact]))[0, 1] > 0.9


def test_importance_estimates_the_mean_square_of_output_gradients():
    g = torch.Generator().manual_seed(0)
    tokens, true = 20_000, torch.logspace(-2, 2, 7)
    X = torch.randn(tokens, 60, generator=g) @ torch.randn(60, 60, generator=g)
    D = torch.randn(tokens, 7, generator=g) * true.sqrt()
    L = torch.linalg.cholesky(X.T @ X / tokens)
    H = torch.linalg.solve_triangular(L.T, D.T @ X / tokens, upper=True, left=False)
    found = importance(X.square().mean(0), H)
    assert (found.outputs * tokens / true - 1).abs().max() < 0.6  # of 60 samples each
    assert torch.equal(found.outputs.argsort(), true.argsort())


def test_loss_aware_rows_cost_less_than_the_last_at_no_more_numbers():
    layers = {str(i): low_rank(*shape, seed=i) for i, shape in enumerate([(30, 9, 6), (9, 30, 4), (12, 12, 5)])}
    g = torch.Generator().manual_seed(1)
    found = {
        n: Importance(torch.rand(m.out_features, generator=g) ** 8, torch.rand(m.in_features, generator=g) ** 8)
        for n, m in layers.items()
    }

    def cost(forms):
        total = 0.0
        for name, form in forms.items():
            up, down = form.factors()
            E = up @ down - layers[name].weight.detach()
            total += float((found[name].outputs[:, None] * E.square() * found[name].inputs).sum())
        return total

    last, chosen = in_8_bits(layers, "remap"), in_8_bits(layers, "remap", found)
    assert cost(chosen) < cost(last)
    bytes_of = {
        k: sum(b.numel() * b.element_size() for f in v.values() for n, b in f.named_buffers() if "order" not in n)
        for k, v in {"last": last, "chosen": chosen}.items()
    }
    assert bytes_of["chosen"] <= bytes_of["last"]


def test_weights_that_are_not_finite_are_not_hidden():
    for change, message in ((float("nan"), "NaN or infinite"), (3e8, "float16 cannot hold")):
        layer = low_rank()
        with torch.no_grad():
            layer.up.weight[-1] = change
        with pytest.raises(QuantizationError, match=rf"here has .*{message}"):
            in_8_bits({"here": layer}, "remap")


def test_a_component_of_nothing_takes_no_rows():
    """Its costs are 0, not NaN, so that a layer of no importance does not get all that others need."""
    layers = {"idle": low_rank(30, 9, 6), "busy": low_rank(30, 9, 6, seed=1)}
    with torch.no_grad():
        layers["idle"].up.weight[:, 2] = 0
    found = {n: Importance(torch.full((30,), B), torch.ones(9)) for n, B in (("idle", 1e-6), ("busy", 1e6))}
    assert all(cost.isfinite().all() for cost in rounding_costs(layers["idle"], found["idle"]))
    forms = in_8_bits(layers, "remap", found)
    assert forms["idle"].spec["rows"] < forms["busy"].spec["rows"]


@pytest.mark.parametrize("storage", ["remap", "hq"])
def test_hooks_flags_and_types_carry_over_and_come_back(storage):
    layers = {"low": low_rank().bfloat16().eval(), "dense": nn.Linear(9, 12, bias=False).bfloat16()}
    layers["low"].requires_grad_(False)
    seen = []
    for layer in layers.values():
        layer.register_forward_hook(lambda *_: seen.append(1))
    layers["dense"].weight.requires_grad_(False)
    forms = in_8_bits(layers, storage)
    for name, form in forms.items():
        form(torch.randn(2, 9, dtype=torch.bfloat16))
        assert form.training == layers[name].training
        back = layer_like(form, {"kind": "low_rank", "rank": 2})
        assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
        assert not back.down.weight.requires_grad
        assert {p.dtype for p in dense_like(form).parameters()} == {torch.bfloat16}
    assert len(seen) == len(forms) == (2 if storage == "hq" else 1)


def test_autocast_gives_the_type_of_other_layers():
    layer = low_rank()
    new = Int8LowRankLinear.of(layer, WIDE["scattered"](12), WIDE["last"](9))
    with torch.autocast("cpu", torch.bfloat16):
        assert new(torch.randn(2, 9)).dtype == layer(torch.randn(2, 9)).dtype == torch.bfloat16


def test_quantize_refuses_what_it_cannot_do():
    with pytest.raises(QuantizationError, match="no low-rank layer"):
        quantize(tiny_llama())
    model = tiny_gpt2()
    compress(model, token_batches(), CompressionConfig(0.4, corrections=0), progress=False)
    with pytest.raises(QuantizationError, match=r"no importance of transformer\.h\.0"):
        quantize(model, "remap", {})
    with pytest.raises(QuantizationError, match="'factors' has not all layers in 8 bits"):
        quantize(model, "factors")
    assert set(STORAGES) == {"factors", "pivoted", "remap", "hq", "mixed"}
