"""Which modules of a model are its blocks."""

import pytest
import torch
from support.models import FAMILIES, tiny_llama, token_batches
from torch import nn

from zssvd_lightning.calibration.batches import token_mask
from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.sweep.chains import structure_of


def structure(model, batch, loss=None):
    layers = LayerSet(find_targets(model))
    return structure_of(model, layers, mask_of(batch, token_mask), loss or (lambda: model(**batch).loss))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers"]),
        ("gpt2", ["transformer.h"]),
        ("bert", ["bert.encoder.layer"]),
        ("vit", ["vit.layers"]),
        ("t5", ["encoder.block", "decoder.block"]),
    ],
)
def test_the_blocks_of_every_family(family, names):
    found = structure(FAMILIES[family].build(), FAMILIES[family].batches()[0])
    assert [chain.name for chain in found.chains] == names
    assert all(len(chain) == 2 for chain in found.chains)
    assert set(found.region_of) == ({"cls.predictions.transform.dense"} if family == "bert" else set())


def layer(width=8):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def test_a_sequence_around_all_blocks_is_no_list_of_blocks():
    inner = nn.Sequential(*(layer() for _ in range(4)))
    model = nn.Sequential(nn.Linear(6, 8), inner, nn.Linear(8, 6))
    x = torch.randn(3, 6)
    found = structure(model, {}, lambda: model(x).square().mean())
    assert [chain.name for chain in found.chains] == ["1"]
    assert found.region_of == {"0": 0}  # and layer 2 is a head


def test_the_search_leaves_no_traces():
    model = tiny_llama().train()
    model.runs = 0

    def count(module, args):
        module.runs += 1

    model.register_forward_pre_hook(count)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    structure(model, token_batches(1)[0])
    assert model.runs == 0
    assert model.training
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
