"""Formulas of memory against what a compression holds."""

import shutil
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import compress
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import BatchReading, extent_by_first, gather
from zssvd_lightning.compression.memory.needs import Extent, Formulas, stored_components
from zssvd_lightning.compression.memory.statements import formulas_of
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import OutputError
from zssvd_lightning.serialization.unfinished import UnfinishedFolder


def bytes_of(mapping):
    return sum(
        tensor.nbytes
        for value in mapping.values()
        for tensor in (value if isinstance(value, tuple) else vars(value).values())
    )


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_spectra_originals_and_factors(storage):
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16)
    config = CompressionConfig.of("svd-llm", prune_ratio=0.3, storage=storage)
    run = Compression(model, config, progress=False)
    formulas = Formulas(Extent.of_layers(run.shapes, 2), config, run.budget)
    stage = course(config)[0]
    gather(run, token_batches(2), stage.gathers)
    run.decompose()
    assert bytes_of(run.decomposition.spectra) == formulas.spectra
    run.decomposition = None
    run.take(stage)
    assert sum(run.originals[name].nbytes for name in run.originals) == formulas.originals
    assert bytes_of(run.truncated.held) == pytest.approx(formulas.factors, rel=0.05)
    new = sum(sum(t.nbytes for t in layer.parameters()) for _, layer in run.truncated.layers(run.gathering.free_widths))
    assert new == pytest.approx(formulas.new_layers, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_held_once_in_their_own_type(dtype):
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    config = CompressionConfig.of("zs-svd", prune_ratio=0.2, corrections=0)
    run = Compression(model, config, progress=False)
    before = {name: target.weight.clone() for name, target in run.targets.items()}
    gather(run, token_batches(2), course(config)[0].gathers)
    moments = run.gathering.moments
    sums = {id(s): s for kind in (moments.input_sums, moments.gradient_sums) for s in kind.values()}
    extent = replace(Extent.of_layers(run.shapes, dtype.itemsize), leaders=moments.leaders)
    formulas = Formulas(extent, config, run.budget)
    every = formulas.second_moments(run.shapes) + formulas.gradients(run.shapes)
    assert sum(tensor.nbytes for tensor in sums.values()) == every
    run.take(course(config)[0])
    truncated = list(run.truncated)
    assert 0 < len(truncated) < len(before)
    assert sorted(run.originals.copies) == sorted(truncated)
    for name, W in before.items():
        assert run.originals[name].dtype is dtype
        assert torch.equal(run.originals[name], W), name
    assert bytes_of({n: (run.originals[n],) for n in truncated}) == sum(before[n].nbytes for n in truncated)
    state = run.originals.state_dict()
    old = {name: target.module.weight for name, target in run.targets.items()}
    run.factorize()
    for name, weight in old.items():
        size = 1 if name in truncated else weight.numel()
        assert weight.untyped_storage().nbytes() == size * dtype.itemsize
    run.restore()
    assert not run.originals.copies
    for name, W in before.items():
        assert torch.equal(model.get_submodule(name).weight, W), name
        assert torch.equal(state[name], W), name


def test_only_components_that_may_be_kept_are_stored():
    shapes = {"wide": (8, 24), "square": (16, 16)}
    for settings, most in (
        ({"preset": "zs-svd"}, {"wide": 5, "square": 7}),
        ({"preset": "zs-svd", "storage": "pivoted"}, {"wide": 7, "square": 15}),
        ({"preset": "zs-svd", "selection": "abs_delta_unordered"}, None),
        ({"preset": "best", "reestimate": True}, None),
    ):
        config = CompressionConfig.of(**settings, prune_ratio=0.3)
        assert stored_components(config, config.budget_over(shapes, {}, 0)) == most


def test_blocks_take_less_than_the_whole_and_more_layers_take_more():
    def needs(layers, memory):
        config = CompressionConfig.of("best", prune_ratio=0.3, memory=memory)
        shapes = {f"{i}": (256, 256) for i in range(layers)}
        names = {name: name for name in shapes}
        extent = Extent(shapes, names, tuple((name,) for name in shapes), 2 * 256 * 256 * layers, 2)
        return Formulas(extent, config, config.budget_over(shapes, {}, 0)).needs()

    (few, few_by_blocks), (many, many_by_blocks) = ((needs(n, "whole"), needs(n, "blocks")) for n in (4, 8))
    assert many_by_blocks.together < many.together
    weights = 4 * 2 * 256 * 256
    assert many_by_blocks.device - few_by_blocks.device == weights  # nothing but the model grows with its layers
    assert many.device - few.device > 4 * weights


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("best", {"corrections": 0}), ("zs-svd", {"corrections": 1, "correction_batches": 1})],
    ids=["best", "zs-svd"],
)
def test_the_folder_of_a_run_takes_what_the_formula_says(preset, settings, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, batches = tiny_llama(hidden_size=128, intermediate_size=192), token_batches(2)
    config = CompressionConfig.of(preset, prune_ratio=0.3, memory="blocks", **settings)
    run = Compression(model, config, progress=False)
    extent = extent_by_first(batches, None, BatchReading.of(model, batches, {}), run)
    sizes, replace_list = [], UnfinishedFolder._replace_list

    def noting(self, *args):
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("zssvd-*.pt")))
        replace_list(self, *args)

    monkeypatch.setattr(UnfinishedFolder, "_replace_list", noting)
    compress(model, batches, config, resume_in=tmp_path / "kept", progress=False)
    expected = Formulas(extent, config, run.budget).needs().folder
    assert 0.6 * expected < max(sizes) < 1.1 * expected


def test_a_disk_without_room_for_the_folder_is_refused_before_a_batch_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, before = tiny_llama(), []
    config = CompressionConfig.of("zs-svd", prune_ratio=0.3, memory="blocks", corrections=0)
    formulas = formulas_of(Compression(model, config, progress=False))
    model.register_forward_pre_hook(lambda *_: before.append(None))
    free = formulas.disk + formulas.folder - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=r"to go on after an interruption, beside .* GB of scratch files"):
        compress(model, token_batches(2), config, resume_in=tmp_path / "kept", progress=False)
    assert before == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * free + 10**6))
    compress(model, token_batches(2), config, resume_in=tmp_path / "kept", progress=False)
