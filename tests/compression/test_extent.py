"""Blocks by which an estimate goes, against those of the sweep."""

import pytest
import torch
from support.models import FAMILIES
from torch import nn

from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import BatchReading, extent_by_first
from zssvd_lightning.compression.memory.extent import extent_of
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.model.targets import find_targets
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
