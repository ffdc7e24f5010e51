"""Layers that the calibration batches do not reach stay dense, and are named together."""

import re

import pytest
import torch
import yaml
from support.models import REASONS, Experts, Unreached, assert_same_state, state_of, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import LowRankLinear, Report, compress
from zssvd_lightning.calibration.reach import Unreached as Reason
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.compression.reach import budget_of_rest, with_fixed
from zssvd_lightning.compression.snapshot import put_back, take_up
from zssvd_lightning.compression.snapshot import state_of as saved_state_of
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import BudgetError, CalibrationError, LeftDenseWarning, ZeroGradientError
from zssvd_lightning.layers.storage import Kept, Present
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.rules import uniform
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.whitening.moments import Moments

PRESETS = ["zs-svd", "zs-svd-line-search", "svd-llm", "best"]
SIX = r"6 of 20 target layers stay dense.*: 28\.6% of the target parameters and 24\.6% of the model; prune_ratio 0\.4 "


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_that_are_not_reached_stay_dense_with_one_warning(preset):
    torch.manual_seed(3)
    model = Unreached()
    dense = {name: model.get_submodule(name).weight.clone() for name in REASONS}
    with pytest.warns(LeftDenseWarning) as told:
        report = compress(model, token_batches(8), preset=preset, prune_ratio=0.4, progress=False)
    (message,) = [str(each.message) for each in told if each.category is LeftDenseWarning]
    for name, reason in REASONS.items():
        assert re.search(rf"\b{name}\b[^:]*: {re.escape(reason)}; ", message)
        assert torch.equal(model.get_submodule(name).weight, dense[name])
    assert report.left_dense == REASONS
    assert len(report.layers) == 14
    assert not report.layers.keys() & REASONS.keys()
    assert report.reached >= 0.4
    assert Report.from_dict(report.to_dict()).left_dense == REASONS


def test_the_rest_is_compressed_as_if_the_layers_had_been_ignored():
    torch.manual_seed(3)
    first = Unreached()
    torch.manual_seed(3)
    second = Unreached()
    with pytest.warns(LeftDenseWarning, match=SIX):
        found = compress(first, token_batches(), prune_ratio=0.4, progress=False)
    wanted = compress(second, token_batches(), prune_ratio=0.4, ignore=list(REASONS), progress=False)
    assert found.layers == wanted.layers
    assert (found.parameters_before, found.reached) == (wanted.parameters_before, wanted.reached)
    assert_same_state(state_of(first), state_of(second))


def test_statistics_of_their_own_and_plans_leave_the_same_layers_dense(tmp_path):
    model = Unreached()
    with pytest.warns(LeftDenseWarning, match=SIX):
        statistics = calibrate(model, token_batches(), prune_ratio=0.4, preset="zs-svd-line-search", progress=False)
    with pytest.warns(LeftDenseWarning, match=SIX):
        chosen = plan(model, token_batches(), prune_ratio=0.4, preset="zs-svd-line-search", progress=False)
    assert list(chosen.ranks)[-6:] == list(REASONS)
    assert all(chosen.ranks[name] is None for name in REASONS)
    chosen.write(tmp_path / "plan.yaml")
    entry = yaml.safe_load((tmp_path / "plan.yaml").read_text())["layers"]["idle"]
    assert entry == {"rank": "dense", "break_even": 15, "shape": [32, 32]}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    asked = {"prune_ratio": 0.4, "preset": "zs-svd-line-search"}
    for settings in (
        asked | {"statistics": statistics},
        {"preset": "zs-svd-line-search", "plan": str(tmp_path / "plan.yaml")},
        asked,
    ):
        model = Unreached()
        model.load_state_dict(state)
        with pytest.warns(LeftDenseWarning, match="6 of 20"):
            results.append(compress(model, token_batches(), corrections=0, progress=False, **settings))
        assert results[-1].asked == pytest.approx(results[-1].reached, abs=0.01)
    assert results[0].layers == results[1].layers == results[2].layers
    assert {name: layer.rank for name, layer in results[0].layers.items()} == {
        name: rank for name, rank in chosen.ranks.items() if name not in REASONS
    }


def test_statistics_of_fewer_layers_are_still_refused():
    model = tiny_llama()
    statistics = calibrate(model, token_batches(), preset="zs-svd-line-search", ignore=["q_proj"], progress=False)
    with pytest.raises(CalibrationError, match=r"leave out model\.layers\.0\.self_attn\.q_proj"):
        compress(model, token_batches(), preset="zs-svd-line-search", statistics=statistics, progress=False)


class Hidden(nn.Module):
    """A model of which no layer is reached."""

    def __init__(self, run):
        super().__init__()
        self.run, self.weight, self.layer = run, nn.Parameter(torch.zeros(())), nn.Linear(8, 8)
        self.embedding = nn.Embedding(97, 8)

    def forward(self, input_ids, **_):
        x = self.embedding(input_ids)
        with torch.no_grad():
            hidden = self.layer(x) if self.run else x
        return hidden.mean() + x.mean()


@pytest.mark.parametrize(
    ("run", "error", "message", "batches"),
    [
        (True, ZeroGradientError, r"no gradient at any layer, though layer \(1 layers\) ran", 1),
        (False, CalibrationError, "reached none of the 1 target layers. layer: saw no token; calibrate on", 4),
    ],
)
@pytest.mark.parametrize("work", [compress, calibrate, plan])
def test_a_model_without_a_reached_layer_is_an_error(work, run, error, message, batches):
    model, seen = Hidden(run), []

    def loss(model, batch):
        seen.append(batch)
        return model(**batch)

    before = state_of(model)
    with pytest.raises(error, match=message):
        work(model, token_batches(4), loss=loss, progress=False)
    assert len(seen) == batches
    assert_same_state(before, state_of(model))


def test_what_is_left_may_be_too_little_for_the_floor():
    """A budget that only all layers together could meet."""

    class Wide(Unreached):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2000, 2000)

    model, settings = (
        Wide(),
        {"prune_ratio": 0.405, "preset": "zs-svd-line-search", "min_rank_fraction": 0.59, "progress": False},
    )
    before = state_of(model)
    with pytest.warns(LeftDenseWarning), pytest.raises(BudgetError, match="at most"):
        compress(model, token_batches(), **settings)
    assert_same_state(before, state_of(model))


CORRECTED = {
    "projected": {"corrections": 1, "correction_step": "projected", "line_search": False},
    "line search": {"corrections": 2, "correction_step": "projected", "line_search": True},
    "kept moments": {"corrections": 2, "correction_step": "projected", "line_search": True, "fresh_moments": False},
    "natural": {"metric": "two_sided", "selection": "curvature", "corrections": 2, "correction_step": "natural"},
    "natural, kept": {
        "metric": "two_sided",
        "selection": "curvature",
        "corrections": 2,
        "correction_step": "natural",
        "fresh_moments": False,
    },
    "refit": {"metric": "two_sided", "corrections": 1, "correction_step": "refit", "fresh_moments": False},
    "in steps": {"corrections": 0, "truncations": 3},
    "mixed": {"storage": "mixed", "metric": "two_sided", "selection": "curvature", "corrections": 1},
    "remap": {"storage": "remap", "rows_in_16_bits": "loss_aware", "corrections": 1},
}


@pytest.mark.parametrize("case", CORRECTED)
def test_a_layer_that_later_batches_do_not_reach_stays_as_it_is(case, caplog):
    batches = token_batches(12)
    model = Experts(lambda number, _: [0, 1] if number < 4 else [0])
    report = compress(
        model,
        batches,
        prune_ratio=0.4,
        calibration_batches=4,
        correction_batches=4,
        progress=False,
        **{"preset": "zs-svd-line-search"} | CORRECTED[case],
    )
    assert "1 of 16 layers stay as the last truncation left them" in caplog.text
    assert re.search(r"experts\.1: (saw no token|ran, but no gradient)", caplog.text)
    assert len(report.layers) == 16
    assert not report.left_dense
    assert report.reached >= 0.4 - 1e-9
    assert model(**batches[0]).loss.isfinite()


@pytest.mark.parametrize("settings", [{}, {"fresh_moments": False}], ids=["fresh", "kept"])
def test_the_rank_and_factors_of_such_a_layer_do_not_change(settings):
    config = CompressionConfig(0.4, correction_batches=2, corrections=1, selection="uniform", **settings)
    model = Experts(lambda number, _: [0, 1] if number < 4 else [0])
    run = Compression(model, config, progress=False)
    first, *others = course(config)
    gather(run, token_batches(4), first.gathers)
    run.take(first)
    before, rank = run.truncated.truncated("experts.1"), run.selection.rank("experts.1")
    assert rank is not None
    for stage in others:
        gather(run, token_batches(4, seed=1), stage.gathers)
        run.take(stage)
        assert torch.equal(run.targets["experts.1"].weight, before)
    assert run.selection.rank("experts.1") == rank
    assert run.budget.reached({n: run.selection.rank(n) for n in run.targets}) >= 0.4


def test_layers_without_measured_curvature_are_ranked_by_the_estimate(caplog):
    config = CompressionConfig(0.4, metric="two_sided", selection="curvature", reestimate=True, corrections=0)
    model = Experts(lambda number, _: [0, 1] if number < 4 else [0])
    run = Compression(model, config, progress=False)
    for stage in course(config):
        gather(run, token_batches(4), stage.gathers)
        run.take(stage)
    assert "1 of 16 layers are ranked without measured curvature" in caplog.text
    assert run.selection.rank("experts.1") is None or run.selection.rank("experts.1") > 1


def test_a_correction_that_reaches_no_layer_is_an_error_and_nothing_is_lost():
    model = tiny_llama()
    state, calls = state_of(model), []

    def loss(model, batch):
        calls.extend([batch] if torch.is_grad_enabled() else [])
        if len(calls) <= 4:
            return model(**batch).loss
        return model.model.embed_tokens(batch["input_ids"]).mean()

    with pytest.raises(CalibrationError, match="correct batches have reached none of the 14 layers"):
        compress(
            model,
            token_batches(),
            prune_ratio=0.4,
            preset="zs-svd-line-search",
            correction_batches=4,
            loss=loss,
            progress=False,
        )
    assert_same_state(state, state_of(model))


def test_a_leader_that_is_left_out_hands_the_shared_second_moment_on():
    moments = Moments(leaders={"q": "q", "k": "q", "v": "q", "o": "o"})
    moments.add_inputs("q", torch.eye(3))
    moments.add_inputs("o", 2 * torch.eye(3))
    moments.leave_out(["q"])
    assert moments.leaders == {"k": "k", "v": "k", "o": "o"}
    assert moments.tokens == {"k": 3, "o": 3}
    torch.testing.assert_close(moments.second_moment("v"), torch.eye(3) / 3)
    moments.leave_out(["k", "v"])
    assert moments.leaders == {"o": "o"}
    assert list(moments.input_sums) == ["o"]


@pytest.mark.parametrize("ratio_of", ["dense", "present"])
def test_low_rank_layers_that_are_not_reached_count_in_a_budget_of_the_model_as_if_they_were_ignored(ratio_of):
    def half_low_rank():
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("first", "second", "third")})
        model["third"] = LowRankLinear(24, 24, 5)
        return model

    def loss(model, x):
        return (model["second"](model["first"](x).relu()) + model["third"](x).detach()).square().mean()

    batches = [torch.randn(64, 24) for _ in range(4)]
    settings = {"prune_ratio": 0.4, "budget_of": "model", "ratio_of": ratio_of, "preset": "zs-svd-line-search"}
    first, second = half_low_rank(), half_low_rank()
    factors = {name: value.clone() for name, value in first["third"].state_dict().items()}
    with pytest.warns(LeftDenseWarning, match="1 of 3 target layers .* third: ran, but no gradient"):
        found = compress(first, batches, loss=loss, progress=False, **settings)
    wanted = compress(second, batches, loss=loss, progress=False, ignore="third", **settings)
    assert found.layers == wanted.layers
    assert (found.reached, found.model_parameters_after) == (wanted.reached, wanted.model_parameters_after)
    assert found.model_parameters_after == sum(p.numel() for p in first.parameters())
    for name in ("first", "second", "third"):
        torch.testing.assert_close(first[name].weight, second[name].weight)
    assert all(torch.equal(value, factors[name]) for name, value in first["third"].state_dict().items())


def test_a_shared_input_whose_first_layer_gets_no_gradient():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.first(x).detach() + self.second(x) + self.third(x)

    torch.manual_seed(0)
    model = Fork()
    batches = [torch.randn(64, 16) for _ in range(4)]
    with pytest.warns(LeftDenseWarning, match="first: ran, but no gradient"):
        compress(model, batches, prune_ratio=0.4, loss=lambda m, b: m(b).square().mean(), progress=False)
    assert set(ranks_of(model)) <= {"second", "third"}
    assert ranks_of(model)


def test_a_compression_with_layers_left_dense_goes_on_from_its_state():
    config = CompressionConfig(0.4, corrections=1, correction_batches=2)
    first, *others = course(config)
    model = Unreached()
    whole = Compression(model, config, progress=False)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    gather(whole, token_batches(), first.gathers)
    with pytest.warns(LeftDenseWarning):
        whole.take(first)
    state, weights = saved_state_of(whole), {name: value.clone() for name, value in model.state_dict().items()}
    for stage in others:
        gather(whole, token_batches(), stage.gathers)
        whole.take(stage)

    other = Unreached()
    other.load_state_dict(weights)
    resumed = Compression(other, config, progress=False)
    take_up(resumed, state)
    for stage in others:
        gather(resumed, token_batches(), stage.gathers)
        resumed.take(stage)
    assert resumed.report().layers == whole.report().layers
    assert resumed.report().left_dense == REASONS

    other.load_state_dict(weights)
    put_back(Compression(other, config, progress=False), state)
    assert all(torch.equal(value, dense[name]) for name, value in other.state_dict().items())


def test_what_fixed_layers_keep_is_taken_from_the_budget_of_the_rest():
    budget = Budget({"a": (32, 32), "b": (32, 32), "c": (32, 32)}, 0.5)
    fixed = Selection({name: torch.arange(8) for name in "abc"}, dict.fromkeys("abc", 0.0))
    rest = budget_of_rest(budget, fixed, {"b": Reason.NEVER_RAN})
    assert list(rest.shapes) == ["a", "c"]
    assert rest.allowed == budget.allowed - 8 * 64
    assert budget_of_rest(budget, None, {}) is budget
    fixed = Selection(dict.fromkeys("abc"), dict.fromkeys("abc", 0.0))
    with pytest.raises(CalibrationError, match=r"b: saw no token.*raise correction_batches"):
        budget_of_rest(
            Budget({"a": (32, 32), "b": (64, 64)}, 0.9),
            Selection({"a": None, "b": None}, {"a": 0.0, "b": 0.0}),
            {"b": Reason.NEVER_RAN},
        )
    chosen = Selection({"a": torch.arange(2), "c": None}, {"a": 1.0, "c": 0.0}, removal_loss=0.5)
    merged = with_fixed(chosen, Selection({n: torch.arange(8) for n in "abc"}, dict.fromkeys("abc", 2.0)), {"b": 1})
    assert [merged.rank(name) for name in "abc"] == [2, 8, None]
    assert merged.drifts == {"a": 1.0, "b": 2.0, "c": 0.0}
    assert merged.removal_loss == 0.5


def test_what_later_batches_reach_keeps_the_ratio_of_the_present_layers():
    shapes = {"a": (32, 32), "b": (32, 32)}
    present = {name: Present(8, Kept(wide=512)) for name in shapes}
    budget = Budget(shapes, 0.3, present=present, ratio_of="present")
    fixed = Selection({"a": None, "b": None}, {"a": 0.0, "b": 0.0})
    rest = budget_of_rest(budget, fixed, {"b": None})
    assert rest.allowed == budget.allowed - 512
    assert rest.total == 512


def test_the_rest_may_stay_as_it_is_where_the_others_have_given_enough():
    budget = Budget({"a": (32, 32), "b": (32, 32)}, 0.3)
    fixed = Selection({"a": None, "b": torch.arange(2)}, {"a": 0.0, "b": 0.0})
    rest = budget_of_rest(budget, fixed, {"b": None})
    assert rest.to_remove == 0
    chosen = uniform({"a": components(32)}, rest)
    assert chosen.kept == {"a": None}


def components(rank):
    sigma = torch.linspace(2.0, 1.0, rank)
    return Components(sigma=sigma, delta=sigma)
