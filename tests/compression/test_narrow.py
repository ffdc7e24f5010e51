"""Hidden widths with fewer units: what is chosen, what the model computes then, and what stays as it is."""

import copy

import pytest
import torch
from support.interruption import interrupted
from support.models import FAMILIES, assert_same_state, state_of, tiny_gpt2, tiny_llama, token_batches

from zssvd_lightning import compress, from_pretrained, merge, save_pretrained
from zssvd_lightning.app.html.page import write_page
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.compression.report import Report, read_report, write_report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CalibrationError, ContradictionError
from zssvd_lightning.layers.narrow import NarrowLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.serialization.state_dict import match_structure

SETTINGS = {
    "prune_ratio": 0.3,
    "metric": "two_sided",
    "selection": "curvature",
    "corrections": 0,
    "narrow": True,
}
ASKED = SETTINGS | {"preset": "zs-svd", "progress": False}
BEST = {"preset": "best", "narrow": True, "prune_ratio": 0.3, "corrections": 2, "progress": False}
FEED_FORWARD = [r"re:.*(mlp|intermediate|DenseReluDense|layer\.\d+\.output)\.\w+"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def output_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def in_double(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def with_biases(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def narrow_in(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NarrowLinear)}


def taken(model, batches, **settings):
    """Return the run after its last stage, before layers are replaced."""
    run = Compression(model, CompressionConfig(**SETTINGS | settings), progress=False)
    for stage in course(run.config):
        gather(run, batches, stage.gathers)
        run.take(stage)
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_narrower_model_computes_what_the_truncated_one_did(family):
    model = with_biases(FAMILIES[family].build().double()).eval()
    for target in find_targets(model).values():
        if target.shape[1] > 32:  # those that read the hidden width of a feed-forward network
            W = target.weight.clone()
            W[:, ::4] = 0
            target.assign(W)
    batches = [in_double(batch) for batch in FAMILIES[family].batches()]
    before = state_of(model)
    run = taken(model, batches, include=FEED_FORWARD, prune_ratio=0.2)
    truncated = output_of(model, batches[0])
    run.factorize()
    narrow = narrow_in(model)
    assert narrow
    assert set(narrow) == set(run.selection.of_narrowed)
    torch.testing.assert_close(output_of(model, batches[0]), truncated, **EXACT)
    for name, layer in narrow.items():
        weight = run.selection.narrower(run.budget.shapes)[name]
        assert tuple(layer.narrow.weight.shape) == weight
        bias = run.targets[name].module.bias
        assert (bias is None) == (layer.narrow.bias is None)
    dense = copy.deepcopy(model)
    merge(dense)
    assert not narrow_in(dense)
    torch.testing.assert_close(output_of(dense, batches[0]), truncated, **EXACT)
    run.restore()
    assert_same_state(before, state_of(model))


def test_the_loss_of_the_reader_is_what_was_predicted():
    """The change of the outputs of `down`, weighted by the moments, is the second-order loss of the selection."""
    model, batches = tiny_llama().double(), token_batches()
    run = Compression(model, CompressionConfig(**SETTINGS | {"include": ["*.mlp.*"]}), progress=False)
    gather(run, batches, course(run.config)[0].gathers)
    moments = {}
    for name in run.targets:
        A, B = (
            M(name).double().clone() for M in (run.gathering.moments.second_moment, run.gathering.moments.output_moment)
        )
        moments[name] = A, B + 1e-2 * B.diagonal().mean() * torch.eye(len(B))  # damped as the metric does
    run.take(course(run.config)[0])
    loss = 0.0
    for name in run.selection.narrowed:
        A, B = moments[name]
        D = run.targets[name].weight - run.originals[name]
        loss += 0.5 * float(torch.trace(D.T @ B @ D @ A))
    assert 0.5 * run.selection.removal_loss < loss <= run.selection.removal_loss  # which shrinks A toward its diagonal


def test_parameters_are_counted_and_the_report_says_what_is_narrower(tmp_path):
    model = with_biases(tiny_gpt2())
    before = sum(p.numel() for p in model.parameters())
    report = compress(model, token_batches(), **ASKED)
    narrow = narrow_in(model)
    assert report.reached >= 0.3
    assert report.parameters_after == sum(layer.kept for layer in report.layers.values())
    for name, layer in narrow.items():
        w, h = report.layers[name].units
        assert w < h == 128
        assert sorted(layer.narrow.weight.shape) == sorted({w, 32})
        assert report.layers[name].kept == layer.narrow.weight.numel() == report.layers[name].flops // 2
        assert report.layers[name].rank is None
    assert {name for name, layer in report.layers.items() if layer.units is not None} == set(narrow)
    assert report.model_parameters_before == before
    assert report.model_parameters_after == sum(p.numel() for p in model.parameters())
    assert "layers with fewer hidden units" in str(report)
    write_report(tmp_path, report)
    w, h = next(layer.units for layer in report.layers.values() if layer.units is not None)
    assert f"dense, {w} of {h} hidden units" in write_page([tmp_path]).read_text()
    assert read_report(tmp_path).layers == report.layers
    assert Report.from_dict(report.to_dict()).layers == report.layers


def test_no_width_is_narrower_where_ranks_cost_less():
    """Weights of low rank lose nothing at that rank, and all units are needed."""
    model = tiny_llama(intermediate_size=64)
    with torch.no_grad():
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                m, n = layer.weight.shape
                layer.weight.copy_(torch.randn(m, 4) @ torch.randn(4, n))
    report = compress(model, token_batches(2), **ASKED | {"include": ["*.mlp.*"], "prune_ratio": 0.7})
    assert not narrow_in(model)
    assert all(layer.rank is not None for layer in report.layers.values())


def test_units_that_never_matter_go_first():
    model = tiny_llama(intermediate_size=64)
    useless = torch.arange(0, 64, 4)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, useless] = 0
            block.mlp.down_proj.weight[:, useless[0]] = 1e-4
    run = taken(model, token_batches(), include=["*.mlp.*"], prune_ratio=0.2, rank_multiple=4)
    assert run.selection.narrowed
    for width in run.selection.narrowed.values():
        assert set(range(64)) - set(width.units.tolist()) <= set(useless.tolist())


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_corrections_leave_narrower_layers_as_they_are(storage):
    model, batches = tiny_llama(), token_batches(4)
    config = CompressionConfig.of(**{k: v for k, v in BEST.items() if k != "progress"}, storage=storage)
    run = Compression(model, config, progress=False)
    first, *others = course(config)
    gather(run, batches, first.gathers)
    run.take(first)
    names, seen = run.selection.of_narrowed, {}
    assert names
    seen = {name: run.targets[name].weight.clone() for name in run.targets}
    for stage in others:
        gather(run, batches, stage.gathers)
        run.take(stage)
    for name, target in run.targets.items():
        assert torch.equal(target.weight, seen[name]) == (name in names or run.selection.kept[name] is None)
    assert run.report().reached >= 0.3


def test_with_best_the_loss_on_the_batches_kept_back_is_never_above_that_without_corrections():
    model = tiny_llama()
    report = compress(model, token_batches(4), **BEST)
    assert narrow_in(model)
    assert report.kept_back["final"] <= report.kept_back["truncated"]
    assert any(isinstance(layer, Factored) for layer in model.modules())


def test_corrections_do_nothing_where_all_layers_are_narrower():
    model = tiny_llama()
    report = compress(model, token_batches(4), **BEST | {"include": ["*.mlp.*"], "prune_ratio": 0.2})
    assert len(narrow_in(model)) == len(report.layers) == 6
    assert report.kept_back["final"] == report.kept_back["truncated"]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_compression_goes_on_from_the_middle(statistics):
    config = CompressionConfig(**SETTINGS | {"corrections": 2, "correction_step": "natural", "fresh_moments": False})
    resumed = interrupted(config, token_batches(), statistics)
    assert resumed.selection.narrowed
    resumed.factorize()
    assert narrow_in(resumed.model)


@pytest.mark.parametrize("self_contained", [False, True])
def test_folders_and_checkpoints_load(self_contained, tmp_path):
    model, batches = tiny_gpt2(), token_batches()
    compress(model, batches, **ASKED)
    expected = output_of(model, batches[0])
    save_pretrained(model, tmp_path / "model", self_contained=self_contained)
    loaded = from_pretrained(tmp_path / "model")
    assert narrow_in(loaded).keys() == narrow_in(model).keys()
    assert torch.equal(output_of(loaded, batches[0]), expected)
    fresh = tiny_gpt2()
    match_structure(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output_of(fresh, batches[0]), expected)
    match_structure(fresh, tiny_gpt2().state_dict())
    assert not narrow_in(fresh)


def test_a_narrower_model_is_compressed_further_without_these_layers():
    model, batches = tiny_llama(), token_batches()
    compress(model, batches, **ASKED)
    narrow = {name: layer.narrow.weight.clone() for name, layer in narrow_in(model).items()}
    report = compress(model, batches, **ASKED | {"prune_ratio": 0.5})
    assert not narrow.keys() & report.layers.keys()
    assert all(torch.equal(layer.narrow.weight, narrow[name]) for name, layer in narrow_in(model).items())
    assert any(part.what == "layers that are compressed already" for part in report.coverage.left_alone)


def test_statistics_of_calibrate_say_whether_widths_were_tried():
    model, batches = tiny_llama(), token_batches()
    expected = compress(copy.deepcopy(model), batches, **ASKED)
    report = compress(copy.deepcopy(model), batches, statistics=calibrate(model, batches, **ASKED), **ASKED)
    assert report.layers == expected.layers
    with pytest.raises(CalibrationError, match="calibrate with narrow=True"):
        compress(model, batches, statistics=calibrate(model, batches, **ASKED | {"narrow": False}), **ASKED)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metric": "input"}, "narrow compares losses"),
        ({"selection": "zero_sum"}, "narrow compares losses"),
        ({"storage": "remap"}, "storage 'remap' has 8 bits"),
        ({"storage": "mixed"}, "storage 'mixed' has 8 bits"),
        ({"memory": "blocks"}, "before widths are chosen"),
        ({"max_memory": "8GiB"}, "max_memory cannot be kept"),
        ({"truncations": 2}, "in the first truncation"),
        ({"reestimate": True}, "leave reestimate or narrow out"),
        ({"corrections": 1, "correction_step": "refit"}, "which narrower layers do not get"),
        ({"plan": "plan.yaml"}, "nothing for narrow to choose"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(settings, says):
    with pytest.raises(ContradictionError, match=says):
        CompressionConfig(**SETTINGS | settings)


def test_no_plan_is_written():
    with pytest.raises(ContradictionError, match="leave narrow out to write one"):
        CompressionConfig(**SETTINGS).refuse_plan()
