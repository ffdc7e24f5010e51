"""Recurrent modules with linear layers against torch's, with all settings, inputs and forms of the matrices."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from zssvd_lightning.layers.apart import recurrent
from zssvd_lightning.layers.apart.recurrent import (
    RecurrentLayers,
    Step,
    fault_of,
    layers_of,
    recurrences,
    separate_recurrences,
)
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

B, T, N, H = 3, 5, 6, 8
SETTINGS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 4, "bias": False}),
    (nn.GRU, {"batch_first": True, "bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
    (nn.RNN, {"num_layers": 2}),
]


def made(kind, settings):
    torch.manual_seed(0)
    module = kind(N, H, **settings).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def states_of(module, *sizes):
    count = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(count, *sizes, module.proj_size or H).double()
    return (h, torch.randn(count, *sizes, H).double()) if module.mode == "LSTM" else h


def inputs_of(module):
    """Inputs with states and without: sequences, a single one, and packed ones in order and not."""
    x = torch.randn(B, T, N).double()
    yield (x if module.batch_first else x.transpose(0, 1)), B
    yield x[0], None
    for lengths in ([2, 5, 3], [5, 5, 1]):
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=lengths[0] == 5)
        yield packed, B


def calls_of(module):
    for x, size in inputs_of(module):
        yield (x,)
        yield x, states_of(module, *(() if size is None else (size,)))


def flat(output):
    if isinstance(output, tuple):
        return [each for part in output for each in flat(part)]
    return [] if output is None else [output]


def gradients(output, module):
    total = sum((y * torch.linspace(-1, 1, y.numel()).double().view_as(y)).sum() for y in output if y.requires_grad)
    return torch.autograd.grad(total, [p for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_outputs_states_and_gradients_are_those_of_torch(kind, settings, by_steps):
    old = made(kind, settings)
    new = RecurrentLayers(old)
    new.by_steps = by_steps
    parameters = {id(p): n for n, p in old.named_parameters()}
    order = [list(parameters).index(id(p)) for p in new.parameters()]
    for call in calls_of(old):
        expected, found = old(*call), new(*call)
        assert type(found[0]) is type(expected[0])
        torch.testing.assert_close(flat(found), flat(expected))
        expected_gradients = gradients(flat(expected), old)
        for place, gradient in zip(order, gradients(flat(found), new), strict=True):
            torch.testing.assert_close(gradient, expected_gradients[place])


def test_dropout_is_between_layers_in_training_alone():
    old = made(nn.LSTM, {"num_layers": 2, "dropout": 0.5})
    new, x = RecurrentLayers(old), torch.randn(T, B, N).double()
    assert not torch.equal(new(x)[0], new(x)[0])
    torch.testing.assert_close(new(x)[1][0][0], old(x)[1][0][0])  # the first layer has no dropout
    torch.testing.assert_close(new.eval()(x), old.eval()(x))
    seen = []
    new.train().ih_l1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = new(x)
    assert 0.2 < (seen[0] == 0).double().mean() < 0.8
    assert first[0].shape == (T, B, H)


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


def dense_with(old, new):
    dense = copy.deepcopy(old)
    with torch.no_grad():
        for name in layers_of(dense):
            getattr(dense, f"weight_{name}").copy_(new.get_submodule(name).weight)
    return dense


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_every_form_of_the_matrices_is_the_module_by_their_weights(form, number):
    old = made(*SETTINGS[number]).float()
    new = RecurrentLayers(copy.deepcopy(old))
    for name in layers_of(old)[::2]:
        m, n = new.get_submodule(name).weight.shape
        bias = new.get_submodule(name).bias
        layer = FORMS[form](torch.randn(m, 3) / 4, torch.randn(3, n) / 4, None if bias is None else bias.detach())
        setattr(new, name, layer)
    dense = dense_with(old, new)
    for given in calls_of(old):
        call = [tuple(s.float() for s in each) if type(each) is tuple else each.float() for each in given]
        expected = flat(dense(*call))
        for by_steps in (False, True):
            new.by_steps = by_steps
            torch.testing.assert_close(flat(new(*call)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_all_singular_values_give_the_same_outputs(kind, settings):
    old = made(kind, settings)
    new = RecurrentLayers(old)
    for name in layers_of(old):
        layer = new.get_submodule(name)
        U, s, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        setattr(new, name, LowRankLinear.from_factors(U * s, V, layer.bias))
    for call in calls_of(old):
        torch.testing.assert_close(flat(new(*call)), flat(old(*call)))


def test_low_rank_factors_of_inputs_come_before_the_fused_loop(monkeypatch):
    new, seen = RecurrentLayers(made(nn.LSTM, {})), []
    new.ih_l0 = LowRankLinear.from_factors(torch.randn(4 * H, 2), torch.randn(2, N), None).double()
    new.ih_l0.up.bias = nn.Parameter(torch.zeros(4 * H).double())
    fused = torch.lstm
    monkeypatch.setitem(recurrent.FUSED, "LSTM", lambda x, *rest: seen.append(x.shape) or fused(x, *rest))
    new(torch.randn(T, B, N).double())
    assert seen == [(T, B, 2)]
    new.hh_l0.register_forward_hook(lambda *_: None)
    new(torch.randn(T, B, N).double())
    assert len(seen) == 1


@pytest.mark.parametrize(("size", "fused"), [(4 * H * H, False), (4 * H * H + 1, True)])
def test_large_layers_of_low_rank_are_called_at_every_position_on_a_cpu(monkeypatch, size, fused):
    monkeypatch.setattr(recurrent, "LARGE", size)
    new, x = RecurrentLayers(made(nn.LSTM, {})), torch.randn(T, B, N).double()
    ran = []
    monkeypatch.setattr(Step, "forward", lambda self, layer, h, position: ran.append(position) or layer(h))
    new(x)
    assert not ran  # it is dense
    W = new.hh_l0.weight.detach()
    new.hh_l0 = LowRankLinear.from_factors(W[:, :2], torch.randn(2, H).double(), new.hh_l0.bias.detach())
    new(x)
    assert ran == ([] if fused else list(range(T)))


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_parameters_settings_and_hooks_are_shared_and_come_back(kind, settings):
    old, calls = made(kind, settings).eval(), []
    old.weight_hh_l0.requires_grad_(requires_grad=False)
    old.register_forward_hook(lambda *_: calls.append(1))
    new, x = RecurrentLayers(old), next(inputs_of(old))[0]
    assert not any(module.training for module in new.modules())
    assert {id(p) for p in new.parameters()} == {id(p) for p in old.parameters()}
    for name, parameter in old.named_parameters():
        assert getattr(new, name) is parameter
    with pytest.raises(AttributeError):
        _ = new.weight_ih_l7
    new.flatten_parameters()
    new(x)
    assert calls == [1]
    new.ih_l0.weight = nn.Parameter(new.ih_l0.weight + 1)
    expected = new(x)
    fresh = new.whole()
    assert type(fresh) is kind
    assert str(fresh) == str(old)
    assert new.whole(old) is old
    for whole in (old, fresh):
        torch.testing.assert_close(flat(whole(x)), flat(expected))
    flags = [(name, p.requires_grad) for name, p in old.named_parameters()]
    assert [(name, p.requires_grad) for name, p in fresh.named_parameters()] == flags
    assert str(old).split("(", 1)[1][:-1] in str(new)
    torch.testing.assert_close(flat(copy.deepcopy(new)(x)), flat(expected))


def test_directions_of_the_first_layer_read_one_tensor():
    new, seen = RecurrentLayers(made(nn.LSTM, {"bidirectional": True})), []
    for name in ("ih_l0", "ih_l0_reverse"):
        new.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(T, B, N).double()
    new(x)
    assert seen[0] is seen[1] is x


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((torch.zeros(1, 2, 3, N),), r"the input is \(1, 2, 3, 6\), but must be"),
        ((torch.zeros(T, B, N), (torch.zeros(1, 2, H), torch.zeros(1, B, H))), r"states are \[\(1, 2, 8\), .*must be"),
        ((torch.zeros(T, N), (torch.zeros(2, H), torch.zeros(1, H))), r"states are \[\(2, 1, 8\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        RecurrentLayers(nn.LSTM(N, H))(*given)


class Scaled(nn.GRU):
    def forward(self, *args):
        return super().forward(*args)[0], None


def with_normalized_weights():
    return nn.utils.parametrizations.weight_norm(nn.LSTM(N, H), "weight_hh_l0")


def with_another_parameter():
    module = nn.LSTM(N, H)
    module.weight_hh_l0_raw = nn.Parameter(module.weight_hh_l0.data)
    return module


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Scaled(N, H), "Scaled may compute something else"),
        (with_normalized_weights, "may compute something else"),
        (with_another_parameter, "not those that nn.LSTM makes"),
        *[(lambda kind=kind: kind(N, H), None) for kind in (nn.LSTM, nn.GRU, nn.RNN)],
    ],
)
def test_modules_that_are_not_torchs_are_named(build, reason):
    fault = fault_of(build())
    assert fault is None if reason is None else reason in fault


def test_modules_of_given_names_get_layers_in_all_their_places():
    model = nn.ModuleList([nn.LSTM(N, H), nn.GRU(N, H), nn.Linear(N, H)])
    model.append(model[0])
    separate_recurrences(model, ["0.hh_l0", "2.ih_l0"])
    assert [type(part) for part in model] == [RecurrentLayers, nn.GRU, nn.Linear, RecurrentLayers]
    assert model[0] is model[3]
    assert [name for name, _ in recurrences(model)] == ["0"]


@pytest.mark.parametrize("by_steps", [False, True])
def test_it_runs_under_autocast_and_can_be_traced(by_steps):
    old = made(nn.LSTM, {"batch_first": True}).float()
    new, x = RecurrentLayers(old).eval(), torch.randn(B, T, N)
    new.by_steps = by_steps
    expected = old.eval()(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(new(x)[0].float(), expected, rtol=5e-2, atol=5e-2)
    traced = torch.jit.trace(new, (x,))
    torch.testing.assert_close(traced(x)[0], expected)
