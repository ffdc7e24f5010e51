"""Convolutions whose groups are layers, against torch's, with all settings, in every form of the matrices."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zssvd_lightning.layers.apart import convolutions
from zssvd_lightning.layers.apart.convolutions import UnfoldedConvolution, unfolded
from zssvd_lightning.layers.apart.grouped import (
    GroupedConvolution,
    grouped,
    grouped_fault_of,
    is_grouped,
    parts_of,
    unfold_groups,
)
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

CASES = [
    (nn.Conv2d(8, 12, 3, groups=2, stride=2, padding=1), (5, 8, 11, 9)),
    (nn.Conv2d(8, 12, (3, 2), groups=4, dilation=(2, 1), padding=(2, 3), stride=(1, 2)), (5, 8, 11, 9)),
    (nn.Conv2d(8, 12, (3, 5), groups=2, padding="same", padding_mode="circular", bias=False), (5, 8, 11, 9)),
    (nn.Conv2d(8, 12, 1, groups=2, stride=3), (8, 11, 9)),
    (nn.Conv1d(8, 12, 5, groups=2, stride=3, padding=2, dilation=2), (5, 8, 21)),
    (nn.Conv1d(8, 12, 5, groups=4, padding="same", padding_mode="replicate"), (8, 21)),
]
SETTINGS = [f"{conv.extra_repr()} of {shape}" for conv, shape in CASES]


def gradients(output, *sources):
    D = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad(output, sources, D)


def matrices(new):
    return [part.kernel_matrix for part in new.channel_groups]


@pytest.mark.parametrize("numbers", [2**22, 100])
@pytest.mark.parametrize(("conv", "shape"), CASES, ids=SETTINGS)
def test_outputs_and_gradients_are_those_of_torch(monkeypatch, conv, shape, numbers):
    monkeypatch.setattr(convolutions, "PATCH_NUMBERS", numbers)
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape).double().requires_grad_()
    new, expected = GroupedConvolution(conv), conv(x)
    of_input, of_weight = gradients(expected, x, conv.weight)
    seen = []
    for hooked in (False, True):
        if hooked:
            matrices(new)[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
        found = new(x)
        torch.testing.assert_close(found, expected)
        found_of_input, *found_of_weights = gradients(found, x, *[layer.weight for layer in matrices(new)])
        torch.testing.assert_close(found_of_input, of_input)
        torch.testing.assert_close(torch.cat(found_of_weights), of_weight.flatten(1))
    assert set(seen) == {conv.weight[0].numel()}


def rows_in_order(up, down, bias):
    return PivotedLinear.from_factors(up, down, bias, torch.arange(len(up)))


def in_8_bits(up, down, bias):
    none = (torch.zeros(size, dtype=torch.bool) for size in (len(up), down.shape[1]))
    return Int8LowRankLinear.of(LowRankLinear.from_factors(up, down, bias), *none)


FORMS = {
    "factors": LowRankLinear.from_factors,
    "rows": PivotedLinear.from_factors,
    "rows in order": rows_in_order,
    "columns": ColumnPivotedLinear.from_factors,
    "8 bits": in_8_bits,
}


def put_in(new, number, layer):
    new.channel_groups[number].kernel_matrix = layer


def dense_with(conv, new):
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight.copy_(new.weight)
    return dense


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, None), (6, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [0, 4])
def test_every_form_and_mixture_of_ranks_is_the_convolution_by_its_weight(form, number, ranks):
    """Rank 6 of matrices with 6 rows costs more than the dense matrix, and None is a dense matrix."""
    conv, shape = CASES[number]
    new, x = GroupedConvolution(conv), torch.randn(shape)
    (m, n), biases = matrices(new)[0].weight.shape, conv.bias.detach().chunk(2)
    for group, rank in enumerate(ranks):
        if rank is not None:
            layer = FORMS[form](torch.randn(m, rank), torch.randn(rank, n), biases[group])
            put_in(new, group, layer)
    expected = dense_with(conv, new)(x)
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-4)
    if form != "8 bits":
        torch.testing.assert_close(new.together(x), expected, rtol=1e-4, atol=1e-4)
    assert new.weight.shape == conv.weight.shape
    torch.testing.assert_close(new.bias, conv.bias)
    matrices(new)[1].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("conv", "shape"), CASES, ids=SETTINGS)
def test_all_singular_values_give_the_same_outputs(conv, shape):
    conv = copy.deepcopy(conv).double()
    x, new = torch.randn(shape).double(), GroupedConvolution(conv)
    for group, layer in enumerate(matrices(new)):
        U, s, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        put_in(new, group, LowRankLinear.from_factors(U * s, V, layer.bias))
    torch.testing.assert_close(new(x), conv(x))


class Products(FlopCounterMode):
    """Counts a multiply-add as two, for convolutions too."""

    def of(self, function, *args):
        with self:
            function(*args)
        return self.get_total_flops()


@pytest.mark.parametrize(("ranks", "rank"), [((2, 2), 2), ((1, 3), 3), ((6, 1), None), ((2, None), None)])
def test_products_together_are_those_of_the_highest_rank_or_of_the_dense_convolution(ranks, rank):
    conv, x = nn.Conv2d(8, 12, 3, groups=2, padding=1), torch.randn(2, 8, 7, 5)
    new = GroupedConvolution(conv)
    for group, k in enumerate(ranks):
        if k is not None:
            put_in(new, group, LowRankLinear.from_factors(torch.randn(6, k), torch.randn(k, 36), torch.randn(6)))
    positions, small = 2 * 7 * 5, sum(2 * 6 * k * 36 for k in ranks if k)
    numbers = 2 * 6 * 36 if rank is None else 2 * rank * (6 + 36)  # of both groups
    assert Products(display=False).of(new.together, x) == 2 * positions * numbers + (small if rank is None else 0)
    assert Products(display=False).of(conv, x) == 2 * positions * 2 * 6 * 36


@pytest.mark.parametrize(("ranks", "apart"), [((16, 17), True), ((15, 17), False)])
def test_on_a_cpu_groups_run_apart_if_their_ranks_are_wide(ranks, apart):
    conv, x = nn.Conv2d(80, 80, 3, groups=2, padding=1), torch.randn(2, 80, 4, 4)
    new = GroupedConvolution(conv)
    for group, k in enumerate(ranks):
        put_in(new, group, LowRankLinear.from_factors(torch.randn(40, k) / 9, torch.randn(k, 360) / 9, torch.randn(40)))
    (products, numbers), positions = ((sum(ranks) * 400, 0) if apart else (2 * 40 * 360, sum(ranks) * 40 * 360)), 32
    assert Products(display=False).of(new, x) == 2 * (positions * products + numbers)
    torch.testing.assert_close(new(x), new.together(x), rtol=1e-4, atol=1e-4)


def test_memory_settings_and_hooks_are_shared_and_come_back():
    conv, calls = nn.Conv2d(8, 12, 3, groups=2, padding=1), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    conv.weight.requires_grad_(False)
    new = GroupedConvolution(conv.eval())
    assert not any(module.training for module in new.modules())
    assert new.groups == 2
    new(torch.randn(1, 8, 5, 5))
    assert calls == [1]
    for group, layer in enumerate(matrices(new)):
        assert layer.weight.data_ptr() == conv.weight[6 * group].data_ptr()
        assert layer.bias.data_ptr() == conv.bias[6 * group].data_ptr()
        assert not layer.weight.requires_grad
        assert layer.bias.requires_grad
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        matrices(new)[1].weight.mul_(2)
        matrices(new)[0].bias.data = matrices(new)[0].bias + 1
    expected = new(x)
    assert new.folded(conv) is conv
    fresh = new.folded()
    assert type(fresh) is nn.Conv2d
    assert str(fresh) == str(conv)
    for whole in (conv, fresh):
        torch.testing.assert_close(whole(x), expected)
    assert [(name, p.requires_grad) for name, p in fresh.named_parameters()] == [("weight", False), ("bias", True)]
    assert "groups=2" in repr(new)


def test_in_the_memory_format_for_images_values_are_copied_and_come_back():
    conv = nn.Conv2d(8, 12, 3, groups=2).to(memory_format=torch.channels_last)
    new, x = GroupedConvolution(conv), torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        matrices(new)[1].weight.mul_(2)
    expected = new(x)
    torch.testing.assert_close(new.folded(conv)(x), expected)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "as in depthwise convolutions"),
        (nn.Conv2d(64, 8, 3, groups=8), "as in depthwise convolutions"),
        (nn.Conv2d(8, 16, 1, groups=8), "as in depthwise convolutions"),
        (nn.Conv2d(8, 16, 3, groups=8), None),
        (Scaled(8, 8, 3, groups=2), "Scaled may compute something else"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=2)), "may compute something else"),
        (nn.Conv3d(8, 8, 3, groups=2), "Conv3d may compute"),
        (nn.Conv2d(8, 8, 3, groups=2), None),
    ],
)
def test_convolutions_that_stay_whole_are_named(conv, reason):
    assert grouped_fault_of(conv) is None if reason is None else reason in grouped_fault_of(conv)


def test_convolutions_of_given_names_are_taken_apart_in_all_their_places():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2))
    model.append(model[1])
    assert [is_grouped(module) for module in model] == [False, True, True, True]
    unfold_groups(model, [f"1.{parts_of(model[1])[1]}", "0.kernel_matrix"])
    assert [type(module) for module in model] == [nn.Conv2d, GroupedConvolution, nn.Conv2d, GroupedConvolution]
    assert model[1] is model[3]
    assert grouped(model) == [model[1]]
    assert not list(unfolded(model))
    assert isinstance(model[1].channel_groups[0], UnfoldedConvolution)


def test_it_can_be_compiled_and_traced():
    conv, x = nn.Conv2d(8, 12, 3, groups=2), torch.randn(2, 8, 7, 7)
    new = GroupedConvolution(conv)
    put_in(new, 0, LowRankLinear.from_factors(torch.randn(6, 1), torch.randn(1, 36), None))
    put_in(new, 1, LowRankLinear.from_factors(torch.randn(6, 2), torch.randn(2, 36), None))
    expected = new(x)
    torch.testing.assert_close(torch.jit.trace(new, (x,))(x), expected)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), expected)
