"""What serving needs of vLLM's plug-in and can be told without vLLM."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from zssvd_lightning.errors import SavedModelError, UnsupportedServingError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.int8 import Int8Linear, Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.serving.fused_linear import FusedLinear, Part, names_of

M, N, K = 12, 16, 5
KINDS = ["dense", "low_rank", "pivoted", "pivoted_columns", "int8", "int8_low_rank"]


TURNED = ["low_rank", "pivoted", "pivoted_columns"]
"""Kinds of which an engine may transpose the weights."""


def saved_layer(kind, m=M, n=N):
    if kind == "dense":
        return nn.Linear(n, m)
    if kind == "int8":
        return Int8Linear.of(nn.Linear(n, m))
    factors = torch.randn(m, K), torch.randn(K, n), torch.randn(m)
    if kind == "pivoted":
        return PivotedLinear.from_factors(*factors)
    if kind == "pivoted_columns":
        return ColumnPivotedLinear.from_factors(*factors)
    layer = LowRankLinear.from_factors(*factors)
    return layer if kind == "low_rank" else Int8LowRankLinear.of(layer, torch.rand(m) < 0.3, torch.rand(n) < 0.3)


def part(layer, held=None, turn=0, name="q_proj"):
    shape = (layer.out_features, layer.in_features)
    return Part(name, layer.spec if isinstance(layer, CompressedLinear) else None, shape, held or shape, turn)


def loaded(*parts_and_layers, turned=False):
    fused = FusedLinear([part for part, _ in parts_and_layers], torch.float32)
    for index, (_, layer) in enumerate(parts_and_layers):
        for name, value in layer.state_dict().items():
            if not name.endswith("bias"):
                fused.load(index, name, value.t() if turned and name.endswith(".weight") else value)
    fused.check()
    return fused


def without_bias(layer, x):
    return layer(x) - layer.bias


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS, ["low_rank", "dense", "low_rank"]])
def test_parts_of_any_kind_stand_side_by_side(kinds, turned):
    layers = [saved_layer(kind, m=M + 2 * index) for index, kind in enumerate(kinds)]
    fused, x = loaded(*((part(layer), layer) for layer in layers), turned=turned), torch.randn(3, N)
    torch.testing.assert_close(fused(x), torch.cat([without_bias(layer, x) for layer in layers], -1))
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@pytest.mark.parametrize("kind", ["dense", "low_rank", "pivoted_columns", "int8"])
def test_shares_of_rows_add_up(kind):
    layer, x = saved_layer(kind), torch.randn(3, N)
    shares = [loaded((part(layer, (M // 2, N), turn), layer), turned=kind in TURNED) for turn in range(2)]
    torch.testing.assert_close(torch.cat([share(x) for share in shares], -1), without_bias(layer, x))


@pytest.mark.parametrize("kind", ["dense", "low_rank", "pivoted", "int8"])
def test_shares_of_columns_add_up(kind):
    layer, x = saved_layer(kind), torch.randn(3, N)
    shares = [loaded((part(layer, (M, N // 2), turn), layer), turned=kind in TURNED) for turn in range(2)]
    outputs = [share(half) for share, half in zip(shares, x.chunk(2, -1), strict=True)]
    torch.testing.assert_close(sum(outputs), without_bias(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "held"),
    [("int8_low_rank", (M, N // 2)), ("pivoted", (M // 2, N)), ("pivoted_columns", (M, N // 2))],
)
def test_what_has_no_shares_is_refused(kind, held):
    with pytest.raises(UnsupportedServingError, match=rf"q_proj is of kind {kind}.*serve it on one"):
        FusedLinear([part(saved_layer(kind), held)], torch.float32)


@pytest.mark.parametrize("first", [0, -1])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("kind", "m", "n"), [("pivoted", 2 * K, N), ("pivoted_columns", M, 2 * K)])
def test_square_coefficients_are_told_by_the_pivots(turned, first, kind, m, n):
    layer, x = saved_layer(kind, m, n), torch.randn(3, n)
    assert (K, K) in {tuple(value.shape) for value in layer.parameters()}
    fused, saved = FusedLinear([part(layer)], torch.float32), list(layer.state_dict().items())
    for name, value in [saved[first], *saved]:
        if not name.endswith("bias"):
            fused.load(0, name, value.t() if turned and name.endswith(".weight") else value)
    fused.check()
    torch.testing.assert_close(fused(x), without_bias(layer, x))


@pytest.mark.parametrize(("name", "shape"), [("up.weight", (M, K + 1)), ("scale", (M,)), ("down.weight", (K,))])
def test_tensors_that_do_not_fit_the_config_are_refused(name, shape):
    fused = FusedLinear([part(saved_layer("low_rank"))], torch.float32)
    with pytest.raises(SavedModelError, match=rf"q_proj\.{name} is"):
        fused.load(0, name, torch.zeros(shape))


def test_tensors_that_never_came_are_named():
    fused = FusedLinear([part(saved_layer("low_rank"))], torch.float32)
    fused.load(0, "down.weight", torch.zeros(K, N))
    with pytest.raises(SavedModelError, match=r"1 tensors are not in the folder, q_proj\.up\.weight"):
        fused.check()


def test_names_to_load_by_are_those_of_all_parts():
    fused = FusedLinear([part(saved_layer(kind)) for kind in ("low_rank", "int8", "low_rank")], torch.float32)
    assert sorted(fused.names) == ["bias", "codes", "down.weight", "scale", "up.bias", "up.weight"]


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("h.0.attn.qkv_proj", ["h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj"]),
        ("h.0.attn.o_proj", ["h.0.attn.o_proj"]),
        ("h.1.attn.qkv_proj", ["h.1.attn.qkv_proj"]),  # fused as saved
        ("qkv_proj", ["q_proj", "k_proj", "v_proj"]),
    ],
)
def test_names_of_the_saved_layers(layer, names):
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert names_of(layer, {"h.1.attn.qkv_proj": {"kind": "low_rank", "rank": 3}}, packed) == names


def test_the_package_does_without_vllm():
    code = "import sys; sys.modules['vllm'] = None; import zssvd_lightning, zssvd_lightning.serving.fused_linear"
    subprocess.run([sys.executable, "-c", code], check=True)
