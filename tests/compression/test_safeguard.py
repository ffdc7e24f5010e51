"""Corrections never leave a model worse than its first truncation, however well it fits its data."""

import copy
import math
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from support.models import image_batches, sequence_pairs, tiny_bert, tiny_llama, tiny_t5, tiny_vit, token_batches
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import BatchEncoding

from zssvd_lightning import compress
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.compression.safeguard import Safeguard, _is_worse
from zssvd_lightning.config.presets import PRESETS
from zssvd_lightning.correction.steps import trusted_radius
from zssvd_lightning.errors import DivergedError
from zssvd_lightning.serialization.kept_batches import batches_of_saved, batches_to_save, number_to_keep_back
from zssvd_lightning.whitening.spectrum import Step

READING = {
    "loss": lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    "terms": lambda batch: len(batch[1]),
    "mask": lambda batch: None,
}


def clusters(spread, count=48, size=32):
    """Batches of noisy points around ten centers."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 32, generator=generator)
    labels = torch.randint(10, (count, size), generator=generator)
    points = centers[labels] + spread * torch.randn(count, size, 32, generator=generator)
    return list(zip(points, labels, strict=True))


def trained(model, batches, loss, until, lr=3e-3):
    """The model, trained until its mean loss is below `until`."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    for _ in range(200):
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            total += float(value)
        if total / len(batches) < until:
            return model.eval()
    pytest.fail(f"the loss ended at {total / len(batches)}")


def mean_loss(model, batches, loss):
    with torch.no_grad():
        return sum(float(loss(model.eval(), batch)) for batch in batches) / len(batches)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("ratio", [0.4, 0.8])
@pytest.mark.parametrize("until", [0.5, 0.05, 1e-3])
def test_best_improves_on_one_truncation_at_any_loss(until, ratio):
    *batches, first, second, third, last = clusters(2.0 if until > 0.1 else 1.0)
    held_out = [first, second, third, last]
    model = trained(mlp(), batches, READING["loss"], until)
    losses = {}
    for corrections in (0, 8):
        other = copy.deepcopy(model)
        given = {"preset": "best", "corrections": corrections, "progress": False}
        report = compress(
            other,
            batches,
            prune_ratio=ratio,
            refuse_diverged=False,
            **{"preset": "zs-svd-line-search"} | given,
            **READING,
        )
        losses[corrections] = mean_loss(other, batches, READING["loss"]), mean_loss(other, held_out, READING["loss"])
        assert report.kept_back["final"] <= report.kept_back["truncated"]
    assert losses[8][0] <= 1.02 * losses[0][0] + 1e-5
    assert losses[8][1] <= 1.1 * losses[0][1] + 1e-3


FAMILIES = {
    "llama": (tiny_llama, token_batches),
    "bert": (tiny_bert, token_batches),
    "t5": (tiny_t5, sequence_pairs),
    "vit": (tiny_vit, image_batches),
}


@pytest.mark.parametrize("output_side", ["empirical", "sampled"])
@pytest.mark.parametrize(
    ("family", "until"),
    # tiny T5 has too few weights to fit its random pairs any better
    [(family, until) for family in FAMILIES for until in (2.0, 0.5, 0.05) if (family, until) != ("t5", 0.05)],
)
def test_a_model_that_fits_its_batches_is_not_destroyed(family, until, output_side):
    build, make = FAMILIES[family]
    torch.manual_seed(0)
    batches = make()
    model = trained(build(), batches, lambda model, batch: model(**batch).loss, until, lr=1e-2)
    settings = {"preset": "best", "output_side": output_side, "progress": False}
    report = compress(model, batches, prune_ratio=0.3, **{"preset": "zs-svd-line-search"} | settings)
    kept = report.kept_back
    assert kept["dense"] <= 2 * until
    assert kept["final"] <= kept["truncated"]
    final = mean_loss(model, batches[: int(kept["batches"])], lambda model, batch: model(**batch).loss)
    assert final == pytest.approx(kept["final"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_ends_worse_than_its_first_truncation(preset):
    batches = clusters(1.5)
    model = trained(mlp(), batches, READING["loss"], 0.1)
    drawn = {"output_side": "empirical"}  # drawing needs a model of transformers
    report = compress(
        model, batches, prune_ratio=0.7, preset=preset, refuse_diverged=False, progress=False, **drawn, **READING
    )
    assert report.kept_back["final"] <= report.kept_back["truncated"]
    measured = mean_loss(model, batches[:8], READING["loss"])
    if not any(layer.in_8_bits for layer in report.layers.values()):
        assert measured == pytest.approx(report.kept_back["final"], rel=1e-3, abs=1e-5)


def diverging(monkeypatch, factor):
    """Let natural steps be longer by a factor, as if the radius were chosen too large."""
    along = Step.along
    monkeypatch.setattr(Step, "along", lambda step, H: factor * along(step, H))


def test_harmful_steps_are_taken_back_and_said(monkeypatch, caplog):
    batches = clusters(1.0)
    model = trained(mlp(), batches, READING["loss"], 0.1)
    other = copy.deepcopy(model)
    once = compress(other, batches, prune_ratio=0.6, preset="best", corrections=0, progress=False, **READING)
    diverging(monkeypatch, 300.0)
    report = compress(model, batches, prune_ratio=0.6, preset="best", corrections=3, progress=False, **READING)
    assert report.kept_back["taken_back"] >= 3
    assert sum(state["taken_back"] for state in report.trace["states"]) == report.kept_back["taken_back"]
    assert report.kept_back["final"] <= once.kept_back["truncated"] * (1 + 1e-6)
    assert mean_loss(model, batches, READING["loss"]) <= 1.5 * mean_loss(other, batches, READING["loss"])
    assert "was taken back" in caplog.text
    assert report.reached >= 0.6


def test_a_truncation_that_leaves_no_finite_loss_is_an_error_and_undone():
    batches, model, measured = clusters(1.0, count=8), mlp(), []
    before = copy.deepcopy(model.state_dict())

    def broken(model, batch):
        measured.extend([] if torch.is_grad_enabled() else [batch])
        after = not torch.is_grad_enabled() and len(measured) > 2  # two batches of eight are kept back
        return READING["loss"](model, batch) * (math.nan if after else 1.0)

    with pytest.raises(DivergedError, match="is nan after the truncation"):
        compress(
            model,
            batches,
            prune_ratio=0.5,
            corrections=0,
            preset="zs-svd-line-search",
            progress=False,
            **READING | {"loss": broken},
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def destroyed(**settings):
    """The report of a compression that loses nearly all of a fitted model, and the model before and after."""
    batches = clusters(0.1, count=8)
    model = trained(mlp(), batches, READING["loss"], 0.02)
    before = copy.deepcopy(model)
    settings = {"prune_ratio": 0.95, "preset": "zs-svd", "progress": False, "metric": "none"} | READING | settings
    return partial(compress, model, batches, **settings), before, model, batches


def test_a_destroyed_model_is_an_error_and_undone():
    run, before, model, _ = destroyed()
    with pytest.raises(DivergedError, match=r"from \S+ to \S+ nats.*refuse_diverged=False"):
        run()
    assert [type(layer) for layer in model] == [type(layer) for layer in before]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def test_a_destroyed_model_is_warned_of_where_it_is_trained_afterward(caplog):
    run, before, model, batches = destroyed(refuse_diverged=False)
    report = run()
    dense, after = (mean_loss(each, batches, READING["loss"]) for each in (before, model))
    assert after > 10 * dense
    assert report.kept_back["final"] > 10 * report.kept_back["dense"]
    assert "or train the factors (recovery)" in caplog.text


@pytest.mark.parametrize(
    ("dense", "after", "raises"),
    [
        (0.1, 1.0, True),
        (0.1, 0.99, False),
        (0.001, 0.4, False),
        (0.0, 0.51, True),
        (3.0, 8.0, False),
        (-0.1, 2.0, False),
    ],
)
def test_only_a_large_rise_to_ten_times_the_loss_is_an_error(dense, after, raises):
    guard = Safeguard(lambda batch: (0.0, 1.0), refuses=True)
    guard.dense, guard.best = dense, after
    guard._losses = torch.tensor([[after, 1.0]], dtype=torch.float64)
    guard._best = (None, guard._losses)
    with pytest.raises(DivergedError) if raises else nullcontext():
        guard.settle(None)


def test_batches_that_cannot_run_twice_are_said_and_change_nothing(caplog):
    batches = clusters(1.0, count=8)

    def once(model, batch):
        if not torch.is_grad_enabled():
            raise ConnectionError("gone")
        return READING["loss"](model, batch)

    model = mlp()
    other = copy.deepcopy(model)
    report = compress(
        model, batches, prune_ratio=0.5, preset="zs-svd-line-search", progress=False, **READING | {"loss": once}
    )
    assert report.kept_back is None
    assert "(ConnectionError: gone), so that corrections are not checked" in caplog.text
    compress(other, batches, prune_ratio=0.5, preset="zs-svd-line-search", progress=False, **READING)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_the_report_tells_the_losses():
    report = compress(tiny_llama(), token_batches(16), prune_ratio=0.4, preset="best", corrections=2, progress=False)
    kept = report.kept_back
    assert kept["batches"] == 4
    assert kept["dense"] == pytest.approx(report.losses[0], rel=0.02)
    assert type(report).from_dict(report.to_dict()).kept_back == kept
    assert "loss on batches kept back" in list(report.table().columns[0].cells)


def test_the_radius_is_a_part_of_what_truncation_took():
    assert trusted_radius(0.03, math.inf) == 0.03
    assert trusted_radius(0.03, 0.0) == 0.0
    assert trusted_radius(10.0, 0.5) == pytest.approx(0.5)


def test_a_step_is_bounded_and_shortened_with_its_bound():
    H = torch.tensor([[3.0, 4.0]])
    assert Step(-1.0).along(H).norm() == 5
    assert Step(-1.0, longest=1.0).along(H).norm() == pytest.approx(1.0)
    assert Step(-1.0, longest=1.0).shortened(0.5).along(H).norm() == pytest.approx(0.5)
    assert torch.equal(Step(0.0).along(H), torch.zeros_like(H))
    assert torch.equal(Step(-1.0, longest=1.0).along(0 * H), torch.zeros_like(H))


@pytest.mark.parametrize(
    ("rises", "worse"),
    [
        ([0.1, 0.1, 0.1], True),
        ([0.5, -0.5, 0.1], False),
        ([-0.1, -0.1, -0.1], False),
        ([math.nan, 0, 0], True),
        ([0.1], True),
    ],
)
def test_a_rise_beyond_noise_is_a_rise(rises, worse):
    before = torch.tensor([[1.0 + i, 10.0] for i in range(len(rises))], dtype=torch.float64)
    after = before.clone()
    after[:, 0] += torch.tensor(rises, dtype=torch.float64)
    assert _is_worse(after, before) == worse


def test_few_batches_are_kept_back():
    assert [number_to_keep_back(count) for count in (1, 2, 8, 33, math.inf)] == [1, 1, 2, 8, 8]
    assert Safeguard(lambda batch: (0.0, 1.0)).report() is None


@pytest.mark.parametrize(("corrections", "truncations"), [(3, 3), (8, 4), (2, 2), (1, 3)])
def test_steps_that_raise_the_prune_ratio_are_not_taken_back_for_it(corrections, truncations):
    batches = clusters(1.0, count=16)
    model = trained(mlp(), batches, READING["loss"], 5e-3)
    settings = {"preset": "best", "corrections": corrections, "truncations": truncations, "progress": False}
    settings = {"preset": "zs-svd-line-search", "refuse_diverged": False} | settings
    report = compress(model, batches, prune_ratio=0.8, **settings, **READING)
    assert report.reached >= 0.8


def test_measuring_leaves_no_traces():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("added", torch.zeros(()))
            self.calls, self.outputs, self.last = 0, [], None
            self.metric = MeanMetric()

        def forward(self, x):
            self.seen.add_(1)
            self.added = self.added + 1
            self.calls += 1
            self.outputs.append(self.calls)
            self.last = "seen"
            self.metric(x.mean())
            return self.inner(x)

    model, batches = Counts(), clusters(1.0, count=8)
    noise = []

    def loss(model, batch):
        if not torch.is_grad_enabled():
            noise.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
        return READING["loss"](model, batch)

    before = torch.get_rng_state(), random.getstate()
    report = compress(
        model,
        batches,
        prune_ratio=0.5,
        corrections=0,
        preset="zs-svd-line-search",
        progress=False,
        **READING | {"loss": loss},
    )
    assert report.kept_back is not None
    assert (model.seen, model.added, model.calls, len(model.outputs)) == (8, 8, 8, 8)
    assert model.metric._update_count == 8
    assert len(set(noise)) == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_loss_that_changes_parameters_is_said(caplog):
    def loss(model, batch):
        with torch.no_grad():
            model[0].bias.add_(0.0)
        return READING["loss"](model, batch)

    compress(
        mlp(),
        clusters(1.0, count=8),
        prune_ratio=0.5,
        preset="zs-svd-line-search",
        progress=False,
        **READING | {"loss": loss},
    )
    assert "changed the parameter 0.bias" in caplog.text


def test_a_failure_of_a_later_measurement_is_said_and_the_run_goes_on(caplog):
    calls, batches = [], clusters(1.0, count=8)

    def loss(model, batch):
        whole = len(batch[0]) == len(batches[0][0])
        calls.extend([] if torch.is_grad_enabled() or not whole else [batch])
        if len(calls) == 6:
            raise ConnectionError("gone")
        return READING["loss"](model, batch)

    report = compress(
        mlp(), batches, prune_ratio=0.5, preset="zs-svd-line-search", progress=False, **READING | {"loss": loss}
    )
    assert report.reached >= 0.5
    assert report.kept_back is None
    assert "ConnectionError: gone" in caplog.text


def test_statistics_need_no_batches_without_corrections():
    model, batches = mlp(), clusters(1.0, count=8)
    statistics = calibrate(copy.deepcopy(model), batches, preset="zs-svd-line-search", progress=False, **READING)
    report = compress(
        model,
        [],
        prune_ratio=0.4,
        corrections=0,
        statistics=statistics,
        preset="zs-svd-line-search",
        progress=False,
        **READING,
    )
    assert report.reached >= 0.4
    assert report.kept_back is None


def test_batches_that_can_be_gone_through_once_are_all_calibrated_on():
    class Once:
        def __init__(self, batches):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

    seen = []

    def loss(model, batch):
        seen.extend([batch] if torch.is_grad_enabled() else [])
        return READING["loss"](model, batch)

    batches = clusters(1.0, count=16)
    compress(
        mlp(),
        Once(batches),
        prune_ratio=0.5,
        corrections=0,
        preset="zs-svd-line-search",
        progress=False,
        **READING | {"loss": loss},
    )
    assert len(seen) == 16


def test_batches_of_transformers_go_through_checkpoints():
    batches = [BatchEncoding({"input_ids": torch.ones(2, 3)}), {"x": [torch.ones(2), 3, "a", None]}]
    again = batches_of_saved(batches_to_save(batches))
    assert isinstance(again[0], BatchEncoding)
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])
    assert again[1] is batches[1]
    assert batches_to_save([object()]) is None
    assert batches_to_save([torch.empty(2**27, dtype=torch.uint8)]) is None
