"""Experts as separate linear layers compute the same as experts in stacked parameters, and share their memory."""

import copy
import pickle

import pytest
import torch
from support.experts import FAMILIES, experts_in, tiny_experts
from support.many_classes import factored
from support.models import tiny_llama, token_batches

from zssvd_lightning.layers.apart.experts import ExpertList, is_stacked, matrices_of
from zssvd_lightning.layers.base import own_memory

TOKENS, TOP = 40, 2


def routed(module, tokens=TOKENS):
    """Tokens, their experts without repetition, and weights."""
    experts, n = len(module.down_proj), 32
    chosen = torch.stack([torch.randperm(experts)[:TOP] for _ in range(tokens)])
    return torch.randn(tokens, n), chosen, torch.rand(tokens, TOP) + 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_experts_compute_the_same_forward_and_backward(family):
    stacked = experts_in(tiny_experts(family))[-1]
    separate = ExpertList(stacked)
    x, chosen, weights = routed(stacked)
    x.requires_grad_()
    outputs, gradients = [], []
    for module in (stacked, separate):
        outputs.append(module(x, chosen, weights))
        (gradient,) = torch.autograd.grad(outputs[-1].square().sum(), x, retain_graph=True)
        outputs[-1].square().sum().backward(inputs=list(module.parameters()))
        gradients.append(gradient)
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for number, expert in enumerate(separate.experts):
        for name, layer in expert.named_children():
            expected = getattr(stacked, name).grad[number]
            torch.testing.assert_close(
                layer.weight.grad.T if stacked.is_transposed else layer.weight.grad, expected, rtol=1e-3, atol=1e-3
            )
            if stacked.has_bias:
                bias = getattr(stacked, f"{name}_bias").grad[number]
                torch.testing.assert_close(layer.bias.grad, bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_shared_and_can_be_made_their_own(family):
    stacked = experts_in(tiny_experts(family))[-1]
    separate = ExpertList(stacked)
    with torch.no_grad():
        separate.experts[2].down_proj.weight.mul_(2.0)
        assert torch.equal(
            stacked.down_proj[2].T if stacked.is_transposed else stacked.down_proj[2],
            separate.experts[2].down_proj.weight,
        )
        own_memory(separate)
        before = stacked.down_proj.clone()
        separate.experts[2].down_proj.weight.zero_()
    assert torch.equal(stacked.down_proj, before)
    for parameter in separate.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.is_contiguous()
    assert separate.stacked(stacked) is stacked
    assert not stacked.down_proj[2].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_stacking_gives_the_module_of_before(family):
    stacked = experts_in(tiny_experts(family))[-1]
    again = ExpertList(stacked).stacked()
    assert type(again) is type(stacked)
    assert again is not stacked
    assert list(again.state_dict()) == list(stacked.state_dict())
    for name, value in stacked.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert again.state_dict()[name].data_ptr() != value.data_ptr()
    given = routed(stacked)
    assert torch.equal(again(*given), stacked(*given))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_lists_of_experts_can_be_copied(copied):
    separate = ExpertList(experts_in(tiny_experts("gpt_oss"))[0])
    again = copied(separate)
    separate.experts[0].down_proj.weight.data.zero_()
    assert again.experts[0].down_proj.weight.any()
    given = routed(separate.stacked())
    assert torch.isfinite(again(*given)).all()


def test_indices_of_no_expert_stand_for_none():
    separate = ExpertList(experts_in(tiny_experts())[0])
    x, chosen, weights = routed(separate.stacked())
    hidden = chosen.clone()
    hidden[:, 1] = 4
    weights[:, 1] = 0.0
    torch.testing.assert_close(separate(x, hidden, weights), separate(x, chosen, weights))


@pytest.mark.parametrize("form", ["dense", "low_rank", "pivoted"])
def test_in_training_experts_without_tokens_get_gradients_of_zero_as_stacked_ones_do(form):
    stacked = experts_in(tiny_experts("gpt_oss"))[0]
    separate = ExpertList(stacked)
    if form != "dense":
        factored(separate, form)
    x, chosen, weights = routed(stacked)
    chosen = chosen % 2
    for training in (False, True):
        separate.train(training).zero_grad(set_to_none=True)
        separate(x, chosen, weights).sum().backward()
        for number, expert in enumerate(separate.experts):
            for parameter in expert.parameters():
                assert (parameter.grad is None) == (number >= 2 and not training)
                if number >= 2 and training:
                    assert not parameter.grad.any()
    separate.eval()
    expected = separate(x, chosen, weights)
    assert torch.equal(separate.train()(x, chosen, weights), expected)


def test_modules_of_other_structures_are_no_stacked_experts():
    model = tiny_experts()
    stacked = experts_in(model)[0]
    assert is_stacked(stacked)
    assert matrices_of(stacked)[:3] == ["0.gate_up_proj", "0.down_proj", "1.gate_up_proj"]
    assert not is_stacked(ExpertList(stacked))
    assert not any(is_stacked(module) for module in tiny_llama().modules())
    another = copy.deepcopy(stacked)
    another.scale = torch.nn.Parameter(torch.ones(4))
    assert not is_stacked(another)
    narrow = copy.deepcopy(stacked)
    narrow.gate_up_proj = torch.nn.Parameter(torch.ones(4, 40, 32))
    assert not is_stacked(narrow)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_logits(family):
    model, batch = tiny_experts(family), token_batches(1)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        for name, module in list(model.named_modules()):
            if is_stacked(module):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, ExpertList(module))
        found = model(**batch).logits
    assert any(isinstance(module, ExpertList) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
