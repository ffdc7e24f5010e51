"""A second compression of a model whose layers are low-rank already."""

import copy

import pytest
import torch
from support.models import assert_same_state, state_of, tiny_gpt2, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import CompressionConfig, LowRankLinear, Report, compress, from_pretrained, save_pretrained
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.errors import BudgetError, CalibrationError, ConfigError, PlanError, TargetError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.serialization.specs import ranks_of, specs_of

BATCHES = token_batches(8)


def dense(**changes):
    return tiny_llama(**({"hidden_size": 64, "intermediate_size": 96} | changes))


def compressed(model, prune_ratio, **settings):
    settings = {"preset": "zs-svd-line-search", "correction_batches": 2, "progress": False} | settings
    return compress(model, BATCHES, prune_ratio=prune_ratio, **settings)


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCHES[0]["input_ids"]).logits


def loss_on_all(model):
    with torch.no_grad():
        return sum(float(model.eval()(**batch).loss) for batch in BATCHES) / len(BATCHES)


@pytest.mark.parametrize(
    ("first", "storage", "rule"),
    [
        ("factors", "factors", "zero_sum"),
        ("factors", "factors", "uniform"),
        ("factors", "factors", "effective_rank"),
        ("factors", "pivoted", "zero_sum"),
        ("pivoted", "factors", "curvature"),
        ("pivoted", "pivoted", "uniform"),
    ],
)
def test_ranks_never_grow_the_budget_is_reached_and_the_report_counts_what_is_there(first, storage, rule):
    settings = {"selection": rule, "corrections": 0, "metric": "two_sided"}
    model = dense()
    total = sum(m * n for m, n in (target.shape for target in find_targets(model).values()))
    before = compressed(model, 0.2, storage=first, **settings)
    ranks, present = ranks_of(model), parameters_of(model)
    after = compressed(model, 0.4, storage=storage, **settings)

    assert after.reached >= 0.4
    assert ranks.items() != ranks_of(model).items()
    assert all(ranks_of(model)[name] <= rank for name, rank in ranks.items())
    assert {name: layer.rank for name, layer in after.layers.items() if layer.rank is not None} == ranks_of(model)
    assert (after.parameters_dense, after.parameters_before) == (total, before.parameters_after)
    assert (after.model_parameters_before, after.model_parameters_after) == (present, parameters_of(model))
    assert after.reached == pytest.approx(1 - after.parameters_after / total)
    assert sum(layer.kept for layer in after.layers.values()) == after.parameters_after


@pytest.mark.parametrize("again", [0.1, 0.2])
def test_a_ratio_that_is_reached_already_is_refused_and_the_model_stays_as_it_is(again):
    model = dense()
    compressed(model, 0.2)
    before = state_of(model)
    with pytest.raises(BudgetError, match=r"reached already.*0\.20\d\d removed.*ratio_of='present'"):
        compressed(model, again)
    assert_same_state(before, state_of(model))


def test_the_ratio_of_the_present_model_counts_from_its_parameters():
    model = dense()
    first = compressed(model, 0.2)
    second = compressed(model, 0.2, ratio_of="present")
    removed = 1 - second.parameters_after / first.parameters_after
    assert second.reached == pytest.approx(removed)
    assert 0.2 <= removed < 0.23
    assert second.ratio_of == "present"
    assert Report.from_dict(second.to_dict()).to_dict() == second.to_dict()


def test_both_ratios_are_the_same_for_a_dense_model():
    one, other = dense(), dense()
    other.load_state_dict(one.state_dict())
    reports = compressed(one, 0.3), compressed(other, 0.3, ratio_of="present")
    assert reports[0].layers == reports[1].layers
    assert not reports[0].compresses_again


def test_an_unknown_reference_is_refused():
    with pytest.raises(ConfigError, match="ratio_of"):
        CompressionConfig(ratio_of="original")


def test_a_layer_that_a_new_truncation_would_not_make_smaller_keeps_its_factors_exactly():
    model = dense()
    compressed(model, 0.2, selection="uniform")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Factored)}
    smallest = next(iter(layers))
    compressed(model, 0.5, selection="uniform", ignore=list(layers)[1:])
    small, factors = model.get_submodule(smallest), copy.deepcopy(model.get_submodule(smallest).state_dict())
    report = compressed(model, 0.4, selection="uniform")
    assert model.get_submodule(smallest) is small
    assert all(torch.equal(value, factors[name]) for name, value in small.state_dict().items())
    assert report.layers[smallest][:4] == (small.rank, (64, 64), small.rank * 128, False)
    assert any(model.get_submodule(name) is not layer for name, layer in layers.items())


def test_in_two_steps_with_the_same_statistics_the_model_is_hardly_worse_than_in_one():
    model = dense()
    for _ in range(30):  # so that there is something to lose
        for parameter, gradient in zip(
            model.parameters(),
            torch.autograd.grad(sum(model(**batch).loss for batch in BATCHES), list(model.parameters())),
            strict=True,
        ):
            parameter.data -= 0.05 * gradient
    direct, stepwise = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"corrections": 0, "selection": "curvature", "metric": "two_sided"}
    statistics = calibrate(model, BATCHES, progress=False, **settings)
    compressed(direct, 0.6, statistics=calibrate(model, BATCHES, progress=False, **settings), **settings)
    compressed(stepwise, 0.3, statistics=statistics, **settings)
    statistics = calibrate(model, BATCHES, progress=False, **settings)
    compressed(stepwise, 0.6, statistics=statistics, **settings)
    lost = loss_on_all(direct) - loss_on_all(model)
    assert lost > 0.01
    assert loss_on_all(stepwise) - loss_on_all(model) < 1.1 * lost


@pytest.mark.parametrize("storage", ["remap", "hq", "mixed"])
def test_a_low_rank_model_can_end_in_8_bits_and_then_is_refused_by_name(storage, tmp_path):
    model = dense()
    compressed(model, 0.2)
    rule = {"selection": "curvature", "metric": "two_sided"}
    report = compressed(model, 0.6, storage=storage, **rule)
    assert report.reached >= 0.6
    ranks = {name: layer.rank for name, layer in report.layers.items() if layer.rank is not None}
    assert ranks == ranks_of(model)
    eight = {name for name, layer in report.layers.items() if layer.in_8_bits}
    assert eight == {name for name, spec in specs_of(model).items() if spec["kind"].startswith("int8")}
    save_pretrained(model, tmp_path / "model")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "model")), logits(model))

    before = state_of(model)
    with pytest.raises(TargetError, match=r"Int8.*8 bits.*before it was quantized; or add it to ignore"):
        compressed(model, 0.7)
    assert_same_state(before, state_of(model))


def test_a_loaded_model_is_compressed_and_saved_again(tmp_path):
    model = dense()
    compressed(model, 0.2, storage="pivoted")
    save_pretrained(model, tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first")
    report = compressed(loaded, 0.4, storage="factors")
    assert report.reached >= 0.4
    save_pretrained(loaded, tmp_path / "second", report=report)
    again = from_pretrained(tmp_path / "second")
    assert specs_of(again) == specs_of(loaded)
    torch.testing.assert_close(logits(again), logits(loaded))
    assert f"{report.reached:.1%} of {report.parameters_dense:,} parameters" in (
        tmp_path / "second" / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("build", [dense, lambda: tiny_gpt2(n_embd=64)])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_planning_calibrating_and_failing_leave_a_low_rank_model_exactly_as_it_was(build, storage, tmp_path):
    model = build()
    compressed(model, 0.3, storage=storage)
    model.get_submodule(next(iter(ranks_of(model)))).register_forward_hook(lambda *_: None)
    before, modules = state_of(model), list(model.modules())
    found = plan(model, BATCHES, prune_ratio=0.5, preset="zs-svd-line-search", progress=False)
    found.write(tmp_path / "plan.yaml")
    calibrate(model, BATCHES, preset="zs-svd-line-search", progress=False)
    with pytest.raises(CalibrationError):
        compressed(model, 0.5, loss=lambda model, batch: torch.tensor(1.0))
    with pytest.raises(KeyError):
        compressed(model, 0.5, loss=_failing_after(12))
    assert_same_state(before, state_of(model))
    assert list(model.modules()) == modules
    assert model.config.quantization_config.layers == specs_of(model)

    report = compressed(model, 0.5, plan=tmp_path / "plan.yaml")
    assert {name: layer.rank for name, layer in report.layers.items()} == {
        name: found.ranks[name] or ranks_of(model).get(name) for name in found.ranks
    }


def _failing_after(calls):
    """A loss that fails in a correction, when weights are truncated already."""
    left = [calls]

    def loss(model, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyError("late")
        return model(**batch).loss

    return loss


def test_a_plan_names_what_stays_low_rank_and_takes_no_other_word_for_it(tmp_path):
    model = dense()
    compressed(model, 0.3, selection="uniform")
    name = next(iter(ranks_of(model)))
    found = plan(model, BATCHES, prune_ratio=0.33, preset="zs-svd-line-search", progress=False)
    found.write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    assert "rank: present" in text
    assert "rank: dense" not in text
    (tmp_path / "dense.yaml").write_text(text.replace("rank: present", "rank: dense"), encoding="utf-8")
    with pytest.raises(PlanError, match=r"rank 'dense'; it must be 1 to .* or present"):
        compressed(model, 0.5, plan=tmp_path / "dense.yaml")
    too_much = text.replace("rank: present", f"rank: {ranks_of(model)[name] + 9}", 1)
    (tmp_path / "more.yaml").write_text(too_much, encoding="utf-8")
    with pytest.raises(PlanError, match="it must be 1 to"):
        compressed(model, 0.5, plan=tmp_path / "more.yaml")


def test_several_truncations_with_corrections_share_what_is_left_to_remove():
    model = dense()
    compressed(model, 0.2)
    ranks = ranks_of(model)
    report = compressed(model, 0.5, truncations=3, corrections=2)
    assert report.reached >= 0.5
    assert all(ranks_of(model)[name] <= rank for name, rank in ranks.items())


def test_hooks_flags_bias_and_mode_carry_over_to_the_new_factors():
    model = tiny_gpt2(n_embd=64)
    compressed(model, 0.3)
    name = next(iter(ranks_of(model)))
    old = model.get_submodule(name)
    calls = []
    handle = old.register_forward_hook(lambda *_: calls.append(1))
    old.down.weight.requires_grad_(False)
    old.up.weight.requires_grad_(False)
    bias = old.bias.detach().clone()
    compressed(model, 0.6, selection="uniform", corrections=0)
    new = model.get_submodule(name)
    assert new is not old
    assert not new.up.weight.requires_grad
    assert new.bias.requires_grad
    assert new.transposed
    torch.testing.assert_close(new.bias, bias)
    calls.clear()
    logits(model)
    assert calls == [1]
    handle.remove()
    logits(model)
    assert calls == [1]


def test_a_layer_used_in_two_places_is_compressed_once_and_replaced_in_both():
    shared = LowRankLinear(32, 32, 12)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(32, 32), "c": shared})
    batches = [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(4)]

    def loss(model, batch):
        return (model["c"](model["b"](model["a"](batch[0]))) - batch[1]).square().mean()

    reading = {"loss": loss, "mask": lambda _: None, "terms": lambda _: 1}
    compress(model, batches, prune_ratio=0.5, preset="zs-svd-line-search", progress=False, **reading)
    assert model["a"] is model["c"]
    assert isinstance(model["a"], LowRankLinear)
    assert model["a"].rank <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [LowRankLinear, PivotedLinear, ColumnPivotedLinear])
def test_stand_ins_compute_what_the_low_rank_layers_do(form, dtype):
    up, down, bias = torch.randn(24, 5, dtype=dtype), torch.randn(5, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    model = nn.Sequential(form.from_factors(up, down, bias)).eval()
    x = torch.randn(7, 16, dtype=dtype)
    expected, layer = model(x), model[0]
    stand_ins = StandIns(model)
    with stand_ins.meanwhile():
        assert type(model[0]) is nn.Linear
        assert not model[0].training
        torch.testing.assert_close(model[0].weight, layer.weight, rtol=0, atol=0)
        if dtype != torch.bfloat16:
            torch.testing.assert_close(model(x), expected)
    assert model[0] is layer
    kept = stand_ins.present["0"].kept
    assert kept.wide == sum(p.numel() for p in model.parameters()) - 24


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model[1].up, "weight", model[0].up.weight), "tied"),
        (lambda model: model[0].to("meta"), "not in memory"),
        (lambda model: setattr(model[0], "adapter", "adapter: {}"), "merge_adapters"),
    ],
)
def test_low_rank_layers_that_cannot_be_compressed_again_say_why(change, reason):
    model = nn.Sequential(LowRankLinear(16, 16, 4), LowRankLinear(16, 16, 4))
    change(model)
    modules = list(model.modules())
    with pytest.raises(TargetError, match=rf"0 \(LowRankLinear\) is compressed already, and .*{reason}.*ignore"):
        StandIns(model)
    assert list(model.modules()) == modules
    assert all(isinstance(layer, CompressedLinear) for layer in model)
