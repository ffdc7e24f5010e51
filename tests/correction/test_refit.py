"""The closed-form refit, against least squares and against the two models run one after the other."""

import copy

import pytest
import torch
from support.attention import Sequences, loss_of, sequence_batches
from support.interruption import interrupted
from support.models import image_batches, padded_batches, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit, token_batches
from support.samplers import second_moment, weight
from torch import nn

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.calibration.batches import token_mask
from zssvd_lightning.calibration.recorded_calls import Call, together
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.compression.snapshot import state_of, take_up
from zssvd_lightning.correction.paired_forward import run_side_by_side
from zssvd_lightning.correction.refit import REFIT_DAMPING, REFIT_PART, refitted_weight
from zssvd_lightning.errors import CalibrationError, CheckpointError, ConfigError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.serialization.kept_batches import number_to_keep_back
from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.spectrum import Spectrum

REFIT = {
    "metric": "two_sided",
    "selection": "curvature",
    "correction_step": "refit",
    "fresh_moments": False,
    "corrections": 1,
    "correction_batches": 3,
}


def test_all_of_the_way_undamped_is_the_least_squares_solution(monkeypatch):
    monkeypatch.setattr("zssvd_lightning.correction.refit.REFIT_PART", 1.0)
    monkeypatch.setattr("zssvd_lightning.correction.refit.REFIT_DAMPING", 0.0)
    X, there, W = torch.randn(50, 6).double(), torch.randn(50, 6).double(), weight(4, 6)
    found = refitted_weight(W, there.T @ there / 50, X.T @ there / 50)
    torch.testing.assert_close(found, torch.linalg.lstsq(there, X @ W.T).solution.T)


def test_half_of_the_way_and_none_where_inputs_are_as_they_were():
    W, A, C = weight(4, 6), second_moment(6), weight(6, 6)
    assert torch.equal(refitted_weight(W, A, A), W)
    damped = A + REFIT_DAMPING * A.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close((refitted_weight(W, A, C) - W) @ damped, REFIT_PART * W @ (C - A))


def noted(model, batches):
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(Call.of(args, kwargs, token_mask(kwargs))), with_kwargs=True
    )
    inputs = {name: [] for name in find_targets(model)}
    handles = [handle] + [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0])
        )
        for name in inputs
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for each in handles:
        each.remove()
    return calls, inputs


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_both_halves_see_what_each_model_gives_alone_also_behind_a_changed_weight(build):
    dense, batches = build().eval().double(), padded_batches()
    if build is tiny_t5:
        batches = token_batches()
    changed = copy.deepcopy(dense)
    layers = find_targets(changed)
    originals = {name: target.weight.clone() for name, target in layers.items()}
    halved = list(layers)[len(layers) // 3]
    with torch.no_grad():
        layers[halved].assign(originals[halved] / 2)
    calls, expected = noted(dense, batches)
    _, behind = noted(changed, batches)
    with torch.no_grad():
        layers[halved].assign(originals[halved])
    met = {}

    def meet(name, X, there):
        met[name] = X, there
        if name == halved:
            layers[name].assign(originals[name] / 2)

    run_side_by_side(changed, together(calls), layers, originals, meet)
    assert met.keys() == layers.keys()
    for name, halves in met.items():
        for found, alone in zip(halves, (expected[name], behind[name]), strict=True):
            counting = [
                X[b["attention_mask"].bool()] if X.shape[1] == 24 else X for X, b in zip(alone, batches, strict=True)
            ]
            torch.testing.assert_close(found, torch.cat([X.flatten(0, -2) for X in counting]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in changed.modules())


def sequentially(model, batches, config):
    """The same by running both models from the start for every layer."""
    compression = Compression(model, config, progress=False)
    gather(compression, batches, Phase.CALIBRATE)
    moments = compression.gathering.moments.second_moments()
    dense = copy.deepcopy(model)
    compression.take(course(config)[0])
    ranks = {name: layer.rank for name, layer in compression.report().layers.items()}
    fitting = batches[number_to_keep_back(len(batches)) :][: config.correction_batches]
    order = [name for name, X in noted(model, fitting[:1])[1].items() if X and ranks[name] is not None]
    for name in order:
        X, there = (torch.cat([x.flatten(0, -2) for x in noted(m, fitting)[1][name]]) for m in (dense, model))
        A, C = there.T @ there / len(X), X.T @ there / len(X)
        sides = METRICS[config.metric]
        whitening = Whitening(sides.inputs(moments, name), sides.outputs(moments, name))
        fitted = refitted_weight(compression.originals[name], A, C)
        up, down = Spectrum.of(fitted, whitening).factors(torch.arange(ranks[name]))
        with torch.no_grad():
            compression.targets[name].assign(up @ down)
    return ranks


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_one_pass_gives_what_a_pass_for_every_layer_does(monkeypatch, build, storage):
    monkeypatch.setattr(Safeguard, "settle", lambda *_: None)  # the refit stays, even if it raises the loss
    config = CompressionConfig(0.4, storage=storage, **REFIT)
    model, batches = build().double(), token_batches()
    other = copy.deepcopy(model).eval()
    report = compress(model, batches, config, progress=False)
    ranks = sequentially(other, batches, config)
    assert {name: layer.rank for name, layer in report.layers.items()} == ranks
    assert len(report.losses) == 2
    ids = batches[-1]["input_ids"]
    torch.testing.assert_close(model.eval()(ids).logits, other(ids).logits, rtol=1e-6, atol=1e-8)


def test_outputs_come_nearer_to_those_of_the_dense_model():
    dense, batches = tiny_llama().eval(), token_batches(6)
    errors = {}
    for corrections in (0, 1):
        model = copy.deepcopy(dense)
        config = CompressionConfig(
            0.5, **REFIT | {"metric": "input", "selection": "uniform", "corrections": corrections}
        )
        compress(model, batches, config, progress=False)
        with torch.no_grad():
            errors[corrections] = sum((model(**b).logits - dense(**b).logits).square().mean() for b in batches)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("statistics", [True, False])
def test_noted_batches_are_in_what_is_saved(statistics):
    interrupted(CompressionConfig(0.4, **REFIT), padded_batches(), statistics)


def test_noted_batches_that_are_too_few_for_more_processes_are_refused(monkeypatch):
    config = CompressionConfig(0.4, **REFIT)
    compression = Compression(tiny_llama(), config, progress=False)
    gather(compression, token_batches(1), Phase.CALIBRATE)
    compression.take(course(config)[0])
    gather(compression, token_batches(1), Phase.CORRECT)
    state = state_of(compression)
    monkeypatch.setattr(type(compression.team), "rank", 1)
    monkeypatch.setattr(type(compression.team), "size", 2)
    with pytest.raises(CheckpointError, match="1 batches noted for a refit, which are too few for 2 processes"):
        take_up(compression, state)


def call(rows=2, length=5, masked=True, **kwargs):
    ids = torch.ones(rows, length, dtype=torch.long)
    return Call((), {"input_ids": ids, **kwargs}, ids.bool() if masked else None)


def test_batches_of_other_lengths_are_padded_where_a_mask_says_so():
    found = together([call(2, 5), call(3, 4)])
    assert found.kwargs["input_ids"].tolist() == [[1] * 5] * 2 + [[1] * 4 + [0]] * 3
    assert torch.equal(found.mask, found.kwargs["input_ids"].bool())
    assert together([call(masked=False)] * 2).mask is None


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([call(length=4, masked=False), call(masked=False)], "of lengths 4, 5 and have no attention_mask"),
        ([call(flag=True), call(flag=False)], "argument 'flag' of the model differs"),
        ([call(), call(flag=False)], "other arguments for some"),
        ([Call((1.0,), {}, None)], "without a tensor of rows"),
    ],
)
def test_batches_that_cannot_be_put_together_are_refused(calls, message):
    with pytest.raises(CalibrationError, match=message):
        together(calls)


def test_arguments_that_may_change_are_refused():
    with pytest.raises(CalibrationError, match="argument 'cache' of the model is a list"):
        Call.of((), {"cache": []}, None)


class Scatters(nn.Module):
    """Gives a layer some of the rows, as a router gives an expert."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()
        self.expert = nn.Linear(97, 97)

    def forward(self, input_ids, labels, attention_mask):
        logits = self.model(input_ids).logits
        some = self.expert(logits.flatten(0, 1)[::3])
        output = nn.functional.cross_entropy(logits.flatten(0, 1)[::3] + some, labels.flatten()[::3])
        return type("Output", (), {"loss": output})


def test_rows_that_cannot_be_told_apart_are_refused_and_the_model_is_put_back():
    model = Scatters()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"expert reads \(128, 97\) of 16 sequences of 24.*add it to ignore"):
        compress(model, token_batches(3), CompressionConfig(0.4, **REFIT), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_positions_first_gives_the_weights_of_rows_first():
    models = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        models.append(Sequences(batch_first))
        report = compress(models[-1], sequence_batches(), CompressionConfig(0.4, **REFIT), loss=loss_of, progress=False)
        assert len(report.losses) == 2
    for name, weight_ in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], weight_, rtol=1e-3, atol=1e-5)


class Flattens(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x.transpose(0, 1))[0].flatten(0, 1))


@pytest.mark.parametrize(
    ("model", "rows", "masked", "message"),
    [
        (Sequences(batch_first=False), (3, 6), True, r"read reads|layers.0.* reads \(6, 6, 16\) of 6 sequences of 6"),
        (Sequences(batch_first=False), (3, 5), False, r"Sequences read \(T, B, n\).*attention_mask"),
        (Flattens(), (3, 5), True, r"head reads \(30, 8\) of 6 sequences of 5"),
    ],
)
def test_layouts_that_cannot_be_told_apart_are_refused(model, rows, masked, message):
    x, mask = torch.randn(*rows, 8), torch.ones(rows, dtype=torch.bool)
    layers = find_targets(model)
    originals = {name: target.weight.clone() for name, target in layers.items()}
    args = (x, mask) if isinstance(model, Sequences) else (x,)
    with pytest.raises(CalibrationError, match=message):
        run_side_by_side(model, Call(args, {}, mask if masked else None), layers, originals, lambda *_: None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_images_are_refitted_on_too():
    report = compress(tiny_vit(), image_batches(), CompressionConfig(0.3, **REFIT), progress=False)
    assert report.reached >= 0.3


def test_ranks_that_several_truncations_reach_cannot_be_refitted():
    with pytest.raises(ConfigError, match="truncations is 2; set it to 1"):
        CompressionConfig(truncations=2, correction_step="refit")
