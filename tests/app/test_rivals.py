"""The rivals of `benchmarks/rivals.py`: depth and width pruning against their definitions, and the size of a file."""

import copy

import pytest
import torch
from support.models import tiny_llama
from torch.nn.functional import cosine_similarity

from benchmarks.removal import narrow_mlps, remove_blocks
from benchmarks.rivals import file_bytes


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=4).eval()


@pytest.fixture
def windows():
    return torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_blocks_that_change_least_are_removed(model, windows):
    dense = copy.deepcopy(model)
    states = [dense(input_ids=ids[None], output_hidden_states=True).hidden_states for ids in windows]
    after_last = []
    with torch.no_grad():
        dense.model.layers[-1].register_forward_hook(lambda _, __, output: after_last.append(output))
        for ids in windows:
            dense(input_ids=ids[None])
    influence = []
    for block in range(4):
        ends = [state[block + 1] if block < 3 else last for state, last in zip(states, after_last, strict=True)]
        pairs = zip(states, ends, strict=True)
        influence.append(1 - sum(float(cosine_similarity(state[block], end, -1).mean()) for state, end in pairs) / 3)
    least = sorted(sorted(range(4), key=influence.__getitem__)[:2])

    assert remove_blocks(model, windows, 2) == least
    kept = [block for number, block in enumerate(dense.model.layers) if number not in least]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]
    for ours, theirs in zip(model.model.layers, kept, strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert model.generate(windows[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


@torch.no_grad()
def test_hidden_units_with_the_smallest_scores_are_removed(model, windows):
    dense = copy.deepcopy(model)
    inputs = []
    dense.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    for ids in windows:
        dense(input_ids=ids[None])
    activations, mlp = torch.cat(inputs), dense.model.layers[2].mlp
    score = mlp.down_proj.weight.abs().sum(0) * activations.norm(dim=0)
    kept = score.topk(30).indices.sort().values

    narrow_mlps(model, windows, 30)
    x = torch.randn(5, 32)
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    expected = hidden[:, kept] @ mlp.down_proj.weight[:, kept].T
    torch.testing.assert_close(model.model.layers[2].mlp(x), expected)
    assert model.config.intermediate_size == 30


def test_a_file_has_every_weight_once_in_16_bits(model):
    tables = 97 * 32
    attention, mlp, norms = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 2 * 32
    assert file_bytes(model) == 2 * (tables + 4 * (attention + mlp + norms) + 32)
