"""Blocks by which an estimate goes, against those of the sweep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import FAMILIES, tiny_llama, token_batches
from torch import nn

from zssvd_lightning.app.memory import empty_model, extent_of_calibration, type_mapped
from zssvd_lightning.app.run_config import CalibrationConfig
from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import BatchReading, extent_by_first
from zssvd_lightning.compression.memory.extent import Extent, extent_of
from zssvd_lightning.compression.memory.needs import PROGRAM, Formulas
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.hub.loading import from_pretrained
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.offload.mapped_weights import MAPS
from zssvd_lightning.sources.models import load_model_config
from zssvd_lightning.sweep.chains import structure_of


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_blocks_of_the_estimate_are_those_of_the_sweep(family):
    torch.manual_seed(0)
    model, batches = FAMILIES[family].build(), FAMILIES[family].batches()
    run = Compression(model, CompressionConfig.of("zs-svd", prune_ratio=0.3), progress=False)
    reading = BatchReading.of(model, batches, {})
    extent = extent_by_first(batches, None, reading, run)
    structure = structure_of(
        model, run.targets, mask_of(batches[0], reading.mask), lambda: reading.loss(model, batches[0])
    )
    assert extent.seen
    assert [*extent.blocks[:-1]] == list(structure.inside.values())
    assert set(extent.blocks[-1]) == structure.region_of.keys()
    assert not extent.mapped


class Parallel(nn.Module):
    """A list whose modules all read the same input, and one whose modules run one after the other."""

    def __init__(self):
        super().__init__()
        self.beside = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.chain(sum(layer(x) for layer in self.beside))


def test_lists_that_do_not_run_one_after_the_other_are_no_blocks():
    model = Parallel()
    targets = find_targets(model)
    extent = extent_of(model, targets, 1, lambda fake: fake(torch.empty(4, 8)))
    assert extent.blocks[:-1] == (("chain.0",), ("chain.1",))
    assert set(extent.blocks[-1]) == {"beside.0", "beside.1", "beside.2"}
    unseen = extent_of(model, targets, 1, None)
    assert not unseen.seen
    assert sorted(name for names in unseen.blocks for name in names) == sorted(targets)


@pytest.mark.skipif(not Path(MAPS).exists(), reason="the system does not list mappings")
def test_mapped_weights_count_while_their_block_runs(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path)
    batches = token_batches(2)
    config = CompressionConfig.of("zs-svd", prune_ratio=0.3, corrections=0, memory="blocks")
    needs = {}
    for dtype in ("float32", "float64"):  # that in which they were saved, and one in which they are not mapped
        model = from_pretrained(tmp_path, dtype)
        run = Compression(model, config, progress=False)
        extent = extent_by_first(batches, None, BatchReading.of(model, batches, {}), run)
        blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
        assert list(extent.mapped) == (blocks if dtype == "float32" else [])
        formulas = Formulas(extent, config, run.budget)
        needs[dtype] = formulas.needs()
        kept = Formulas(replace(extent, mapped=()), config, run.budget).needs()
        assert needs[dtype][:2] == kept[:2]  # a GPU has all weights
        empty = empty_model(load_model_config(str(tmp_path)), dtype)
        saved = type_mapped(str(tmp_path), load_model_config(str(tmp_path)))
        assert saved is torch.float32
        names = [name for name, parameter in empty.named_parameters() if parameter.dtype is saved]
        calibration = CalibrationConfig(text="-", samples=4, length=16, batch_size=2)
        assert extent_of_calibration(empty, find_targets(empty), calibration, names).mapped == extent.mapped
        if dtype == "float32":
            assert kept.together - needs[dtype].together == sum(blocks) - max(blocks)
        else:
            assert kept == needs[dtype]
    assert type_mapped("package:some", load_model_config(str(tmp_path))) is None


def test_new_layers_of_many_mapped_blocks_are_the_peak():
    """They take memory at the end, where those of other models take that of the weights that they replace."""
    shapes = {f"{number}": (256, 256) for number in range(100)}
    config = CompressionConfig.of("zs-svd", prune_ratio=0.3, corrections=0, memory="blocks")
    size = 4 * 256 * 256
    extent = Extent(shapes, {n: n for n in shapes}, (*((n,) for n in shapes), ()), 100 * size, 4, mapped=(size,) * 100)
    formulas = Formulas(extent, config, config.budget_over(shapes, {}, 0))
    assert formulas.needs().together == PROGRAM + formulas.new_layers
