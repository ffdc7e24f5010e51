"""Grouped products over stacks of experts: the same outputs as expert by expert, and never of weights that changed."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.experts import FAMILIES, experts_in, tiny_experts
from support.many_classes import factored
from torch import nn

from zssvd_lightning import LowRankLinear, arrange_for_decoding
from zssvd_lightning.layers.apart.experts import ExpertList
from zssvd_lightning.layers.apart.removed import RemovedLinear
from zssvd_lightning.layers.apart.stacks import MOST_PADDING, _groups
from zssvd_lightning.layers.registry import form_for

KINDS = ["low_rank", "pivoted"]
TOKENS = 30


def low_rank_experts(kind="low_rank", family="gpt_oss", ranks=(8, 9, 24, 5), dense=()):
    """Experts of different ranks, of which some stay dense, with parameters that require gradients."""
    torch.manual_seed(0)
    experts = ExpertList(experts_in(tiny_experts(family))[-1])
    for number, (expert, rank) in enumerate(zip(experts.experts, ranks, strict=True)):
        for name, layer in list(expert.named_children()):
            m, n = layer.weight.shape
            k = min(rank, m - 1, n - 1)
            if (number, name) not in dense:
                up, down = torch.randn(m, k) / k**0.5, torch.randn(k, n) / n**0.5
                setattr(expert, name, form_for(kind, m, n).from_factors(up, down, layer.bias))
    return experts.eval()


def routed(tokens=TOKENS, top=2, count=4):
    chosen = torch.stack([torch.randperm(count)[:top] for _ in range(tokens)])
    return torch.randn(tokens, 32), chosen, torch.rand(tokens, top) + 0.5


def assert_grouped(experts, given, expected=None):
    """The experts run with grouped products, which give what they give one by one, or what is expected."""
    with torch.no_grad():
        expected = experts.one_by_one(*given) if expected is None else expected
        found = experts(*given)
    assert experts._stacks is not None
    assert experts._stacks.hold()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_experts_one_by_one(family, kind):
    assert_grouped(low_rank_experts(kind, family), routed())


@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrices_beside_low_rank_ones_are_stacked_too(kind):
    experts = low_rank_experts(kind, dense={(0, "down_proj"), (1, "gate_up_proj"), (1, "down_proj")})
    assert_grouped(experts, routed())
    assert len(experts._stacks.groups) >= 3


@pytest.mark.parametrize("own", [True, False])
def test_pivots_with_another_order_or_none(own):
    experts = low_rank_experts("pivoted")
    for expert in experts.experts:
        for layer in expert.children():
            layer.order = layer.order.flip(0) if own else None
    assert_grouped(experts, routed())


def test_the_product_of_the_factors_is_what_a_dense_module_computes():
    experts = low_rank_experts("pivoted")
    dense = copy.deepcopy(experts)
    for expert in dense.experts:
        for name, layer in list(expert.named_children()):
            W = nn.Linear(layer.in_features, layer.out_features)
            W.weight, W.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
            setattr(expert, name, W)
    given = routed()
    assert_grouped(experts, given, dense.stacked()(*given).detach())


def test_numbers_of_no_expert_stand_for_none():
    experts, (x, chosen, weights) = low_rank_experts(), routed()
    chosen[:7, 1], chosen[7:12, 0], chosen[12] = 4, -1, 4
    assert_grouped(experts, (x, chosen, weights))
    with torch.no_grad():
        assert not experts(x, torch.full_like(chosen, 4), weights).any()


def test_removed_experts_are_in_no_stack_and_refuse_tokens():
    experts, (x, chosen, weights) = low_rank_experts(), routed()
    for name, layer in list(experts.experts[1].named_children()):
        setattr(experts.experts[1], name, RemovedLinear.like(layer).to_empty(device="cpu"))
    chosen = torch.where(chosen == 1, 4, chosen)
    assert_grouped(experts, (x, chosen, weights))
    chosen[0, 0] = 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="has chosen an expert that was removed"):
        experts(x, chosen, weights)


def in_place(experts):
    with torch.no_grad():
        next(experts.experts[0].down_proj.children()).weight.mul_(2.0)


def through_data(experts):
    next(experts.experts[2].down_proj.children()).weight.data.neg_()


def other_memory(experts):
    weight = next(experts.experts[1].gate_up_proj.children()).weight
    weight.data = weight.data * 3


def another_parameter(experts):
    part = next(experts.experts[1].gate_up_proj.children())
    part.weight = nn.Parameter(part.weight.detach() + 1)


def another_bias(experts):
    layer = experts.experts[3].down_proj
    layer.bias.data.add_(1.0)


def another_layer(experts):
    experts.experts[0].down_proj = LowRankLinear.from_factors(torch.randn(32, 6), torch.randn(6, 24), torch.randn(32))


def loaded(experts):
    experts.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in experts.state_dict().items()})


def assigned(experts):
    state = {k: v * 2 if v.is_floating_point() else v.clone() for k, v in experts.state_dict().items()}
    experts.load_state_dict(state, assign=True)


def moved(experts):
    experts.double().float()


def stepped(experts):
    experts.train()(*routed()).square().sum().backward()
    torch.optim.SGD(experts.parameters(), lr=0.1).step()
    experts.eval()


CHANGES = [
    in_place,
    through_data,
    other_memory,
    another_parameter,
    another_bias,
    another_layer,
    loaded,
    assigned,
    moved,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [*CHANGES, stepped], ids=lambda change: change.__name__)
def test_no_change_of_the_weights_is_missed(kind, change):
    experts, given = low_rank_experts(kind), routed()
    assert_grouped(experts, given)
    with torch.no_grad():
        before = experts(*given)
    change(experts)
    assert_grouped(experts, given)
    with torch.no_grad():
        assert (change is moved) == torch.allclose(experts(*given), before, rtol=1e-3)


def test_another_order_of_the_outputs_is_noticed():
    experts, given = low_rank_experts("pivoted"), routed()
    assert_grouped(experts, given)
    order = experts.experts[0].gate_up_proj.order
    order.copy_(order.flip(0))
    assert_grouped(experts, given)


@pytest.mark.parametrize("place", ["experts.0", "experts.0.down_proj", "experts.0.down_proj.up"])
def test_hooks_see_their_calls(place):
    experts, given, seen = low_rank_experts(), routed(), []
    assert_grouped(experts, given)
    module = experts.experts[0].get_submodule(place.removeprefix("experts.0").removeprefix("."))
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        experts(*given)
        assert len(seen) == 1
        hook.remove()
        experts(*given)
    assert len(seen) == 1
    assert_grouped(experts, given)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_the_memory_of_the_stacks_and_train_as_before(kind):
    experts, given = low_rank_experts(kind), routed()
    another = copy.deepcopy(experts)
    assert_grouped(experts, given)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in experts.parameters()}
    biases = sum(p.nbytes for name, p in experts.named_parameters() if name.endswith("bias"))
    assert sum(memory.values()) - biases < 2 * sum(p.nbytes for p in experts.parameters())  # ranks are raised to 8
    for module in (experts, another):
        optimizer = torch.optim.AdamW(module.train().parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(*given).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, experts.parameters(), another.parameters()))
    assert_grouped(experts.eval(), given)


def test_saved_weights_have_memory_of_their_own(tmp_path):
    experts, given = low_rank_experts(), routed()
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    assert_grouped(experts, given)
    saved = experts.state_dict()
    assert list(saved) == list(before)
    for name, value in saved.items():
        assert torch.equal(value, before[name])
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
    save_file(saved, tmp_path / "saved.safetensors")
    assert saved["0.down_proj.up.weight"].data_ptr() == experts.experts[0].down_proj.up.weight.data_ptr()
    assert_grouped(experts, given)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_stacks_of_their_own(copied):
    experts, given = low_rank_experts(), routed()
    assert_grouped(experts, given)
    again = copied(experts)
    in_place(experts)
    assert again._stacks is None
    assert_grouped(again, given)
    assert_grouped(experts, given)


def test_stacks_made_in_inference_mode_serve_training():
    experts, given = low_rank_experts(), routed()
    with torch.inference_mode():
        found = experts(*given)
    assert experts._stacks.hold()
    experts.train()(*given).sum().backward()
    torch.testing.assert_close(found.clone(), experts(*given).detach(), rtol=1e-4, atol=1e-5)


def test_what_runs_one_by_one():
    given = routed()
    for change in ("eager", "train", "gradients", "few tokens", "many tokens", "dense", "int8", "float64", "autocast"):
        experts, inputs = (
            low_rank_experts(dense={(i, n) for i in range(4) for n in ("gate_up_proj", "down_proj")}),
            given,
        )
        if change != "dense":
            factored(experts, "int8" if change == "int8" else "low_rank")
        if change == "eager":
            experts.config._experts_implementation = "eager"
        if change == "float64":
            experts, inputs = experts.double(), (given[0].double(), given[1], given[2].double())
        if change == "few tokens":
            inputs = tuple(part[:8] for part in given)
        if change == "many tokens":
            inputs = tuple(part.repeat(2, 1) for part in given)
        experts.train(change == "train")
        with torch.set_grad_enabled(change == "gradients"), torch.autocast("cpu", enabled=change == "autocast"):
            assert torch.equal(experts(*inputs), experts.one_by_one(*inputs)), change
        assert experts._stacks is None, change


def test_weights_that_are_arranged_for_decoding_stay_so(monkeypatch):
    monkeypatch.setattr("zssvd_lightning.model.decode_layout.NARROWEST", 8)
    experts, given = low_rank_experts(), routed()
    assert_grouped(experts, given)
    count = arrange_for_decoding(experts)
    assert count >= 4
    with torch.no_grad():
        assert torch.equal(experts(*given), experts.one_by_one(*given))
    assert experts._stacks is None
    assert sum(not p.is_contiguous() for p in experts.parameters()) == count


def test_experts_of_similar_ranks_are_together():
    kinds = (LowRankLinear, LowRankLinear)
    sizes = {number: (kinds, (rank, rank)) for number, rank in enumerate([64, 8, 56, 72, 10, 200])}
    groups = _groups(sizes)
    assert sorted(number for group in groups for number in group) == list(range(6))
    assert {frozenset(group) for group in groups} == {
        frozenset({1}),
        frozenset({4}),
        frozenset({2, 0, 3}),
        frozenset({5}),
    }
    for group in groups:
        ranks = [sizes[number][1][0] for number in group]
        assert max(ranks) * len(ranks) <= MOST_PADDING * sum(-(-rank // 8) * 8 for rank in ranks)
    assert _groups({0: (kinds, (8, 8)), 1: ((nn.Linear, LowRankLinear), (0, 8))}) != [[0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_list_has_no_graph_break(kind):
    experts, given = low_rank_experts(kind, dense={(1, "down_proj")}), routed()
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (TOKENS, 7):
            inputs = tuple(part[:tokens] for part in given)
            torch.testing.assert_close(compiled(*inputs), experts.one_by_one(*inputs), rtol=1e-4, atol=1e-5)
        in_place(experts)
        torch.testing.assert_close(compiled(*given), experts.one_by_one(*given), rtol=1e-4, atol=1e-5)
