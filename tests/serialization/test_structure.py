import copy

import pytest
import torch
from support.models import FAMILIES, assert_same_state, state_of, tiny_gpt2, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import CompressionConfig, LowRankLinear, compress, load_state_dict
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.layers.registry import dense_like
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.serialization.state_dict import match_structure, note


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_follows_weights_to_low_rank_and_back(family):
    build, batches, _ = FAMILIES[family]
    dense = build().train()
    model, compressed = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(compressed, batches(), CompressionConfig(0.4, corrections=0), progress=False)
    match_structure(model, compressed.state_dict())
    model.load_state_dict(compressed.state_dict())
    assert ranks_of(model) == ranks_of(compressed)
    assert_same_state(state_of(compressed), state_of(model))
    match_structure(model, dense.state_dict())
    model.load_state_dict(dense.state_dict())
    assert_same_state(state_of(dense), state_of(model))


def test_flags_types_and_modes_carry_over_both_ways():
    layer = nn.Linear(8, 6, dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    low_rank = LowRankLinear.like(layer, rank=2)
    for new in (low_rank, dense_like(low_rank)):
        assert not new.training
        flags = {n: p.requires_grad for n, p in new.named_parameters()}
        assert flags.pop(next(n for n in flags if n.endswith("bias")))
        assert not any(flags.values())
        assert {p.dtype for p in new.parameters()} == {torch.float64}


def test_making_layers_draws_no_random_numbers():
    layer = tiny_gpt2().transformer.h[0].attn.c_attn
    before = torch.random.get_rng_state()
    dense_like(LowRankLinear.like(layer, rank=3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_names_that_only_look_like_factors_are_left_alone():
    model = nn.ModuleDict({"up": nn.Linear(9, 9), "down": nn.Linear(9, 9)})
    match_structure(model, copy.deepcopy(model).state_dict())
    assert not ranks_of(model)


def test_missing_names_pass_where_loading_is_not_strict_but_shapes_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    match_structure(model, {"0.weight": torch.zeros(4, 4)}, strict=False)
    with pytest.raises(CheckpointError, match=r"3 missing \(0.bias, 1.bias, 1.weight\)"):
        match_structure(model, {"0.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=r"1 of another shape \(0.weight \(5, 4\) instead of \(4, 4\)\)"):
        match_structure(model, {"0.weight": torch.zeros(5, 4)}, strict=False)


def test_modules_that_load_in_their_own_way_are_trusted():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    weights = model.state_dict()
    del weights["1.num_batches_tracked"]
    weights._metadata["1"]["version"] = 1
    match_structure(model, weights)
    model.load_state_dict(weights)


def test_the_note_is_one_entry_at_a_low_rank_layer_which_drops_it():
    model = tiny_llama()
    assert note(model) == {}
    compress(model, token_batches(), CompressionConfig(0.4, corrections=0), progress=False)
    (name,) = note(model)
    assert isinstance(model.get_submodule(name.partition(".low-rank: ")[0]), LowRankLinear)
    assert "LowRankCheckpointMixin" in name
    earlier = f"{name.partition('.low-rank: ')[0]}.low-rank: inherit zssvd_lightning.LowRankCheckpointMixin, to load"
    model.load_state_dict(model.state_dict() | note(model) | {earlier: torch.empty(0)})
    match_structure(model, model.state_dict() | {earlier: torch.empty(0)})


@pytest.mark.parametrize("storage", ["factors", "pivoted", "hq"])
def test_weights_load_into_a_dense_module_of_any_kind(storage):
    compressed, dense = tiny_llama(), tiny_llama()
    config = CompressionConfig(0.6, metric="input", corrections=0, storage=storage)
    compress(compressed, token_batches(), config, progress=False)
    found = load_state_dict(dense, compressed.state_dict() | note(compressed))
    assert not found.missing_keys
    batch = token_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(dense(**batch).logits, compressed(**batch).logits)
    before = dense.state_dict()
    with pytest.raises(CheckpointError, match="do not belong to this LlamaForCausalLM"):
        load_state_dict(dense, {"lm_head.weight": torch.zeros(2, 2)})
    assert before.keys() == dense.state_dict().keys()
