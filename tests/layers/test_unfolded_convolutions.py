"""Unfolded convolutions against torch's, with all settings, in every form of the matrix."""

import copy

import pytest
import torch
from torch import nn

from zssvd_lightning.layers.apart import convolutions
from zssvd_lightning.layers.apart.convolutions import UnfoldedConvolution, fault_of, unfold, unfolded
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

CASES = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 11, 9)),
    (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=(2, 3), stride=(1, 2)), (5, 4, 11, 9)),
    (nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="circular", bias=False), (5, 4, 11, 9)),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (5, 4, 11, 9)),
    (nn.Conv2d(4, 6, 1, stride=3), (5, 4, 11, 9)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (4, 11, 9)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2), (5, 4, 21)),
    (nn.Conv1d(4, 6, 5, padding="same", padding_mode="replicate"), (5, 4, 21)),
    (nn.Conv1d(4, 6, 1), (4, 21)),
]
SETTINGS = [f"{conv.extra_repr()} of {shape}" for conv, shape in CASES]


def gradients(output, *sources):
    D = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad(output, sources, D)


@pytest.mark.parametrize("numbers", [2**22, 300, 10])
@pytest.mark.parametrize(("conv", "shape"), CASES, ids=SETTINGS)
def test_outputs_and_gradients_are_those_of_torch(monkeypatch, conv, shape, numbers):
    monkeypatch.setattr(convolutions, "PATCH_NUMBERS", numbers)
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape).double().requires_grad_()
    new, expected = UnfoldedConvolution(conv), conv(x)
    assert torch.equal(new(x), expected)
    assert new.positions(x) == expected.shape[-len(conv.kernel_size) :]
    seen = []
    new.kernel_matrix.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    found = new(x)
    torch.testing.assert_close(found, expected)
    of_input, of_weight = gradients(expected, x, conv.weight)
    found_of_input, found_of_weight = gradients(found, x, new.kernel_matrix.weight)
    torch.testing.assert_close(found_of_input, of_input)
    torch.testing.assert_close(found_of_weight, of_weight.flatten(1))
    row = expected.shape[-1] if len(conv.kernel_size) == 2 else 1
    assert max(seen) <= max(numbers, row * conv.weight[0].numel())


@pytest.mark.parametrize("padding", [(2, 1), "same", "valid"])
def test_settings_may_change_after_a_convolution_is_made(padding):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1).double(), torch.randn(2, 4, 11, 9).double()
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 3), padding
    new, expected = UnfoldedConvolution(conv), conv(x)
    new.kernel_matrix.register_forward_pre_hook(lambda *_: None)  # so that patches are made
    torch.testing.assert_close(new(x), expected)
    assert new.positions(x) == expected.shape[2:]


def test_a_batch_without_images_has_no_outputs():
    new = UnfoldedConvolution(nn.Conv2d(4, 6, 3))
    new.kernel_matrix.register_forward_pre_hook(lambda *_: None)
    assert new(torch.zeros(0, 4, 8, 7)).shape == (0, 6, 6, 5)


def test_a_convolution_in_two_places_is_unfolded_in_both():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    net.append(net[0])
    unfold(net, ["0.kernel_matrix"])
    assert isinstance(net[0], UnfoldedConvolution)
    assert net[2] is net[0]


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [0, 3, 6])
def test_every_form_of_the_matrix_is_the_convolution_by_its_weight(form, number):
    conv, shape = CASES[number]
    new, x = UnfoldedConvolution(conv), torch.randn(shape)
    n = conv.weight[0].numel()
    layer = FORMS[form](torch.randn(6, 4), torch.randn(4, n), conv.bias.detach())
    new.kernel_matrix = layer
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight.copy_(layer.weight.reshape(conv.weight.shape))
    torch.testing.assert_close(new(x), dense(x), rtol=1e-4, atol=1e-4)
    assert new.weight.shape == conv.weight.shape
    if form != "8 bits":
        fast = new(x)
        layer.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(new(x), fast, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("conv", "shape"), CASES[::3], ids=SETTINGS[::3])
def test_all_singular_values_give_the_same_outputs(conv, shape):
    x, new = torch.randn(shape), UnfoldedConvolution(conv)
    U, s, V = torch.linalg.svd(new.kernel_matrix.weight.detach(), full_matrices=False)
    new.kernel_matrix = LowRankLinear.from_factors(U * s, V, conv.bias)
    torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-5)


def test_memory_settings_and_hooks_are_shared_and_come_back():
    conv, calls = nn.Conv2d(4, 6, 3, padding=1), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    conv.weight.requires_grad_(False)
    new = UnfoldedConvolution(conv.eval())
    assert new.kernel_matrix.weight.data_ptr() == conv.weight.data_ptr()
    assert new.kernel_matrix.bias is conv.bias
    assert not new.kernel_matrix.weight.requires_grad
    assert not new.training
    assert new.padding == (1, 1)
    new(torch.randn(1, 4, 5, 5))
    assert calls == [1]
    assert new.folded(conv) is conv
    fresh = new.folded()
    assert type(fresh) is nn.Conv2d
    assert str(fresh) == str(conv)
    assert torch.equal(fresh.weight, conv.weight)
    assert str(conv).removeprefix("Conv2d(")[:-1] in str(new)


def test_in_the_memory_format_for_images_values_are_copied_and_come_back():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    new, x = UnfoldedConvolution(conv), torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(new(x), conv(x))
    with torch.no_grad():
        new.kernel_matrix.weight.mul_(2)
    expected = new(x)
    torch.testing.assert_close(new.folded(conv)(x), expected)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "channels are in groups"),
        (nn.Conv2d(4, 4, 3, groups=4), "channels are in groups"),
        (Scaled(4, 8, 3), "Scaled may compute something else"),
        (nn.Conv3d(4, 8, 3), "Conv3d may compute"),
        (nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d may compute"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), "may compute something else"),
        (nn.Conv2d(4, 8, 3), None),
    ],
)
def test_convolutions_that_are_no_single_matrix_are_named(conv, reason):
    assert fault_of(conv) is None if reason is None else reason in fault_of(conv)


def test_convolutions_of_given_names_are_unfolded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    unfold(model, ["0.kernel_matrix", "1.kernel_matrix", "7.kernel_matrix"])
    assert [name for name, _ in unfolded(model)] == ["0"]
