import copy
import itertools
import warnings

import pytest
import torch
from support.models import (
    FAMILIES,
    assert_same_state,
    padded_batches,
    state_of,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from zssvd_lightning import CompressionConfig, LowRankLinear, compress
from zssvd_lightning.compression.gathering import loss_in
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import (
    BudgetError,
    CalibrationError,
    ContradictionError,
    NonFiniteError,
    RankDeficientWarning,
    TargetError,
)
from zssvd_lightning.layers.int8 import EightBitLinear
from zssvd_lightning.layers.pivoted import PivotForm
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.moments import Moments


def run(model, batches=None, *, refuse_diverged=True, **settings):
    config = CompressionConfig(**({"prune_ratio": 0.3} | settings))
    batches = token_batches() if batches is None else batches
    return compress(model, batches, config, refuse_diverged=refuse_diverged, progress=False)


def low_rank(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ends_with_the_parameters_that_were_asked_for(family):
    model = FAMILIES[family].build()
    targets = find_targets(model)
    others = sum(p.numel() for p in model.parameters()) - sum(t.weight.numel() for t in targets.values())
    report = run(model, FAMILIES[family].batches())
    layers = low_rank(model)
    assert report.reached >= 0.3
    assert report.reached == pytest.approx(0.3, abs=0.03)
    assert {n: r.rank for n, r in report.layers.items() if r.rank is not None} == {n: m.rank for n, m in layers.items()}
    assert sum(p.numel() for p in model.parameters()) - others == report.parameters_after
    assert layers
    loss = model(**FAMILIES[family].batches()[0]).loss
    loss.backward()
    assert all(p.grad is not None for m in layers.values() for p in m.parameters())


@pytest.mark.parametrize("preset", ["best", "mpifa"])
def test_ranks_are_multiples_after_a_correction(preset):
    settings = {"preset": preset, "corrections": 1, "correction_batches": 2, "rank_multiple": 8}
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    report = compress(model, token_batches(), prune_ratio=0.4, progress=False, **settings)
    ranks = {name: layer.rank for name, layer in report.layers.items() if layer.rank is not None}
    assert ranks
    assert report.reached >= 0.4
    for name, rank in ranks.items():
        assert rank % {64: 4, 32: 2}[min(report.layers[name].shape)] == 0
    assert report.rank_multiple == 8
    assert "of a rank that is a multiple of 8" in str(report)


@pytest.mark.parametrize("corrections", [0, 1, 5, 10])
def test_any_number_of_corrections(corrections):
    report = run(tiny_llama(), corrections=corrections)
    assert report.reached >= 0.3
    assert len(report.losses) == 1 + 3 * corrections
    assert ("correct" in report.seconds) == (corrections > 0)


@pytest.mark.parametrize("sized", [True, False])
def test_one_batch_is_enough_for_corrections(sized):
    batches = token_batches(1)
    given = batches if sized else DataLoader(Stream(batches), batch_size=None)
    report = compress(tiny_llama(), given, prune_ratio=0.3, preset="best", corrections=2, progress=False)
    assert len(report.losses) == 3


@pytest.mark.parametrize(
    ("sized", "expected"),
    [(True, [0, 1, *[2, 3], *[4, 1], *[2, 3]]), (False, [0, 1, *[2, 3], *[4, 1], *[1, 2]])],
)
def test_corrections_go_on_with_the_batches_after_calibration_and_leave_out_those_kept_back(sized, expected):
    batches, seen = token_batches(5), []

    def loss(model, batch):
        if torch.is_grad_enabled():  # the loss of batches kept back is measured without gradients
            seen.append(next(i for i, b in enumerate(batches) if b["input_ids"] is batch["input_ids"]))
        return model(**batch).loss

    config = CompressionConfig(0.3, corrections=3, correction_batches=2, fresh_moments=False, line_search=False)
    given = batches if sized else DataLoader(Stream(batches), batch_size=None)
    compress(tiny_llama(), given, config, calibration_batches=2, progress=False, loss=loss)
    assert seen == expected


def test_calibration_takes_the_first_batches_each_time():
    model, batches = tiny_llama(), token_batches(4)
    few = calibrate(model, batches, calibration_batches=2, progress=False)
    alone = calibrate(model, batches[:2], progress=False)
    assert all(torch.equal(A, alone.input_sums[name]) for name, A in few.input_sums.items())
    config = CompressionConfig(0.3, corrections=1, correction_batches=2, line_search=False)
    report = compress(model, batches, config, calibration_batches=2, progress=False)
    assert len(report.losses) == 3
    assert report.losses[0] == pytest.approx(alone.mean_loss)


@pytest.mark.parametrize("count", [0, 5])
def test_no_more_calibration_batches_than_there_are(count):
    model = tiny_llama()
    for function in (compress, calibrate, plan):
        with pytest.raises(CalibrationError, match=f"calibration_batches is {count}, of 4 batches"):
            function(model, token_batches(4), calibration_batches=count, progress=False)


@pytest.mark.parametrize(("metric", "selection"), list(zip(itertools.cycle(METRICS), RULES, strict=False)))
def test_metrics_and_selections_with_the_corrections_of_the_defaults(metric, selection):
    model = tiny_llama()
    report = run(model, metric=metric, selection=selection)
    assert report.reached >= 0.3
    assert model(**token_batches(1)[0]).loss.isfinite()


def test_factorized_model_computes_what_the_truncated_weights_would():
    model = tiny_gpt2().eval()
    dense = copy.deepcopy(model)
    run(model)
    for name, layer in low_rank(model).items():
        find_targets(dense)[name].assign(layer.up.weight.detach() @ layer.down.weight.detach())
    batch = token_batches(1)[0]
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-5)


def test_layers_left_dense_keep_their_very_weights():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    report = run(model, prune_ratio=0.15, corrections=2)
    kept = [name for name, layer in report.layers.items() if layer.rank is None]
    assert kept
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_correction_brings_the_truncated_loss_down_where_the_model_had_learned_something():
    torch.manual_seed(1)
    model, batches = tiny_llama(), token_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()

    def truncated_loss(corrections):
        compressed = copy.deepcopy(model)
        run(compressed, batches, prune_ratio=0.4, corrections=corrections, refuse_diverged=False)
        with torch.no_grad():
            return sum(compressed(**b).loss.item() for b in batches)

    assert truncated_loss(1) < truncated_loss(0)


def test_same_batches_give_the_same_model_to_the_bit():
    one, batches = tiny_llama(), padded_batches()
    other = copy.deepcopy(one)
    first, second = run(one, batches), run(other, batches)
    assert first.layers == second.layers
    assert_same_state(state_of(one), state_of(other))


def test_any_module_with_a_loss_of_its_own():
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Dropout(0.5), nn.Linear(24, 3))
    batches = [(torch.randn(64, 16), torch.randint(0, 3, (64,))) for _ in range(3)]
    report = compress(
        model,
        batches,
        CompressionConfig(prune_ratio=0.4),
        progress=False,
        loss=lambda m, b: cross_entropy(m(b[0]), b[1]),
    )
    assert report.reached >= 0.4


def test_modes_flags_and_gradients_of_what_remains_are_as_before():
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    run(model, prune_ratio=0.6)
    assert all(m.training for m in model.modules())
    assert not model.model.embed_tokens.weight.requires_grad
    q_proj = model.model.layers[0].self_attn.q_proj
    assert isinstance(q_proj, LowRankLinear)
    assert not q_proj.up.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.up.weight.requires_grad
    assert torch.equal(model.model.norm.weight.grad, torch.ones(32))
    assert model.config.use_cache
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_half_precision_stays_half_precision():
    model = tiny_llama().bfloat16()
    run(model, prune_ratio=0.4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_few_tokens_warn_of_jitter_and_go_on():
    batches = [{k: v[:1, :8] for k, v in b.items()} for b in token_batches(2)]
    with pytest.warns(RankDeficientWarning, match="jitter"):
        report = run(tiny_llama(), batches, corrections=0)
    assert report.reached >= 0.3


def test_few_tokens_are_warned_of_once_and_enough_of_them_never():
    few = [{k: v[:1, :8] for k, v in b.items()} for b in token_batches(2)]
    with pytest.warns(RankDeficientWarning) as caught:
        run(tiny_llama(), few, corrections=2, correction_batches=1)
    assert sum(isinstance(each.message, RankDeficientWarning) for each in caught) == 1
    model = tiny_llama()
    for block in model.model.layers:  # an input that is always 0 makes a second moment singular, and changes nothing
        block.input_layernorm.weight.data[3] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankDeficientWarning)
        run(model, corrections=1)


class Liar(list):
    def __len__(self):
        return 9


class Idle(nn.Module):
    """A language model with a layer that never runs."""

    def __init__(self, read=False):
        super().__init__()
        self.model, self.idle, self.read = tiny_llama(), nn.Linear(32, 32), read

    def forward(self, **batch):
        output = self.model(**batch)
        if self.read:
            self.idle(torch.ones(40, 32))
        return output


def poisoned(value):
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    return model


def poisoned_where_it_does_not_show():
    """Infinite inputs at one layer, of which the loss is finite nevertheless."""
    model = Idle()

    def forward(**batch):
        output = model.model(**batch)
        output.loss = output.loss + model.idle(torch.full((40, 32), float("inf"))).nan_to_num(0, 0, 0).sum()
        return output

    model.forward = forward
    return model


def padding():
    batch = token_batches(1)[0]
    batch["attention_mask"].zero_()
    return [*token_batches(2), batch]


BAD = {
    "no batches": (tiny_llama, list, {}, CalibrationError, "ended after 0"),
    "ends early": (tiny_llama, lambda: Liar(token_batches()), {}, CalibrationError, "ended after 4 of 9"),
    "cannot start again": (tiny_llama, lambda: iter(token_batches()), {}, CalibrationError, "gone through again"),
    "all padding": (tiny_llama, padding, {}, CalibrationError, "all padding"),
    "nan loss": (lambda: poisoned(float("nan")), token_batches, {}, NonFiniteError, "loss"),
    "infinite inputs": (poisoned_where_it_does_not_show, token_batches, {}, NonFiniteError, "inputs of idle"),
    "floor": (tiny_llama, token_batches, {"prune_ratio": 0.8, "min_rank_fraction": 0.5}, BudgetError, "at most"),
    "no target": (tiny_llama, token_batches, {"ignore": ["*"]}, TargetError, "no layer"),
    "head": (tiny_llama, token_batches, {"include": ["lm_head"]}, TargetError, "tied"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error_and_nothing_is_lost(case):
    build, batches, settings, error, message = BAD[case]
    model = build().train()
    before = state_of(model)
    with pytest.raises(error, match=message):
        run(model, batches(), **settings)
    after = state_of(model)
    if case == "nan loss":
        before["weights"] = {n: w.nan_to_num(7.0) for n, w in before["weights"].items()}
        after["weights"] = {n: w.nan_to_num(7.0) for n, w in after["weights"].items()}
    assert_same_state(before, after)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_failure_at_any_step_restores_the_model(step):
    model = tiny_llama().train()
    before, calls = state_of(model), []

    def failing(model, batch):
        calls.extend([batch] if torch.is_grad_enabled() else [])
        if len(calls) == step:
            raise ConnectionError("gone")
        return model(**batch).loss

    with pytest.raises(ConnectionError):
        compress(model, token_batches(2), CompressionConfig(0.3, corrections=2), loss=failing, progress=False)
    assert_same_state(before, state_of(model))


def test_an_iterator_is_refused_before_it_is_read_where_one_pass_is_not_enough():
    read = []
    batches = (read.append(batch) or batch for batch in token_batches())
    with pytest.raises(CalibrationError, match="batches are a generator, which ends after one pass, but 3 passes"):
        compress(tiny_llama(), batches, CompressionConfig(0.3, corrections=1, line_search=False), progress=False)
    assert not read
    report = compress(tiny_llama(), batches, CompressionConfig(0.3, corrections=0), progress=False)
    assert report.reached >= 0.3


class Stream(IterableDataset):
    def __init__(self, batches=None):
        self.batches = batches or token_batches()

    def __iter__(self):
        return iter(self.batches)


def test_a_stream_without_a_length_will_do():
    report = run(tiny_llama(), DataLoader(Stream(), batch_size=None), corrections=1)
    assert report.losses[0] == pytest.approx(run(tiny_llama(), corrections=0).losses[0], rel=0.1)
    with pytest.raises(CalibrationError, match="ended after 0"):
        run(tiny_llama(), DataLoader([], batch_size=None))


def test_no_loss_is_an_error():
    with pytest.raises(CalibrationError, match="scalar loss"):
        compress(tiny_llama(), token_batches(), progress=False, loss=lambda m, b: m(**b).logits)


def test_second_compression_leaves_the_factors_alone_if_ignored():
    model = tiny_llama()
    run(model, include=["mlp.*_proj"])
    first = low_rank(model)
    run(model, ignore=["mlp.*_proj"])
    assert first.items() <= low_rank(model).items()


def test_passes_in_bfloat16_give_nearly_the_same_statistics():
    model = tiny_llama()
    config = CompressionConfig(0.3, metric="two_sided")
    exact = calibrate(copy.deepcopy(model), token_batches(), config, progress=False)
    near = calibrate(model, token_batches(), config, progress=False, loss=loss_in("bf16-mixed"))
    for name in exact.output_sums:
        A, B = exact.output_moment(name), near.output_moment(name)
        assert 0 < (A - B).norm() <= 0.1 * A.norm()


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_mixed_storage_chooses_bits_and_meets_the_budget_in_bytes(ratio):
    model = tiny_llama()
    settings = {"metric": "two_sided", "selection": "curvature", "storage": "mixed", "budget_in": "bytes"}
    report = run(model, prune_ratio=ratio, corrections=0, **settings)
    assert report.reached >= ratio
    assert report.budget_in == "bytes"
    chosen = {name for name, layer in report.layers.items() if layer.in_8_bits}
    assert chosen
    assert chosen == {n for n, m in model.named_modules() if isinstance(m, EightBitLinear)}
    assert model(**token_batches(1)[0]).loss.isfinite()


@pytest.mark.parametrize("unit", ["parameters", "bytes", "flops"])
def test_budgets_in_every_unit_are_met(unit):
    report = run(tiny_llama(), prune_ratio=0.4, corrections=0, budget_in=unit)
    assert report.reached == pytest.approx(0.4, abs=0.03)
    assert report.reached >= 0.4
    assert report.to_dict()["prune_ratio"]["of"] == unit


def test_pivoted_layers_keep_as_many_numbers_as_the_report_says():
    model = tiny_llama()
    report = run(model, storage="pivoted", metric="two_sided", selection="curvature")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PivotForm)}
    assert {n: m.rank for n, m in layers.items()} == {n: r.rank for n, r in report.layers.items() if r.rank is not None}
    for name, layer in layers.items():
        assert sum(part.weight.numel() for part in layer.thin_layers().values()) == report.layers[name].kept
    assert report.reached == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_compiled_model_gets_the_layers_of_one_that_is_not(storage):
    torch.compiler.reset()
    plain = tiny_llama()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager")
    run(plain, storage=storage, corrections=0)
    run(compiled, storage=storage, corrections=0)
    assert_same_state(state_of(plain), state_of(compiled))


class Two(Team):
    """Says that there is another process."""

    size = 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "blocks"}, "memory 'blocks'"),
        ({"max_memory": "1GB"}, "max_memory"),
        ({"memory": "blocks", "resume_in": "folder"}, "resume_in and memory 'blocks'"),
        ({"statistics": Moments()}, "statistics"),
    ],
)
def test_what_several_processes_cannot_do_together_is_refused(settings, words):
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(ContradictionError, match=f"2 processes cannot compress one model together with {words}"):
        compress(model, token_batches(), prune_ratio=0.3, team=Two(), progress=False, **settings)
    assert_same_state(before, state_of(model))
