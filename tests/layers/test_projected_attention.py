"""Attention with linear layers against torch's, with all settings and arguments."""

import copy
import itertools

import pytest
import torch
from torch import nn

from zssvd_lightning.layers.apart.attention import ProjectedAttention, fault_of, project, projected
from zssvd_lightning.layers.low_rank import LowRankLinear

B, L, S, E, H = 3, 4, 5, 8, 2
SETTINGS = [
    {},
    {"batch_first": True, "dropout": 0.4},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10, "bias": False, "add_zero_attn": True},
    {"kdim": 6, "add_bias_kv": True, "batch_first": True},
]


def attention_of(**settings):
    module = nn.MultiheadAttention(E, H, **settings).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def inputs_of(module, *, batched=True):
    sizes = ((L, module.embed_dim), (S, module.kdim), (S, module.vdim))
    xs = [torch.randn(B, *size).double() for size in sizes]
    if not batched:
        return [x[0].requires_grad_() for x in xs]
    return [(x if module.batch_first else x.transpose(0, 1)).detach().requires_grad_() for x in xs]


def masks_of(*, batched):
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, -2:] = True
    ahead = torch.ones(L, S, dtype=torch.bool).triu(1)
    of_heads = torch.randn((B if batched else 1) * H, L, S).double()
    return itertools.product((None, padding if batched else padding[1]), (None, ahead, of_heads, of_heads > 1.5))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_weights_and_gradients_are_those_of_torch(settings):
    old = attention_of(**settings)
    new = ProjectedAttention(old)
    for batched in (True, False):
        xs = inputs_of(old, batched=batched)
        for (padding, mask), need, average in itertools.product(masks_of(batched=batched), (0, 1), (0, 1)):
            causal = mask is not None and mask.dtype is torch.bool and mask.dim() == 2
            given = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": bool(need)}
            given |= {"average_attn_weights": bool(average), "is_causal": causal}
            found = []
            for module in (old, new):
                torch.manual_seed(7)  # for dropout
                output, weights = module(*xs, **given)
                D = torch.linspace(-1, 1, output.numel()).double().view_as(output)
                matrices = [p for p in module.parameters() if p.dim() == 2]
                gradients = torch.autograd.grad(output, [*xs, *matrices], D)
                found.append(
                    [output, weights, *gradients[:3], torch.cat(gradients[3:], 1 if "kdim" in settings else 0)]
                )
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_memory_is_shared_and_all_of_the_attention_comes_back(settings):
    old = attention_of(**settings).eval()
    old.requires_grad_(False)
    calls = []
    old.register_forward_hook(lambda *_: calls.append(1))
    new, xs = ProjectedAttention(old), inputs_of(old)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    expected = new(*xs)
    assert calls == [1]
    torch.testing.assert_close(old(*xs), expected)
    new.v_proj.weight.data = new.v_proj.weight + 1
    expected = new(*xs)
    fresh = new.packed()
    assert new.packed(old) is old
    for whole in (old, fresh):
        torch.testing.assert_close(whole(*xs), expected)
    assert [(name, p.requires_grad) for name, p in fresh.named_parameters()] == [
        (name, p.requires_grad) for name, p in old.named_parameters()
    ]
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name), check_dtype=False)
    plain = {name: value for name, value in vars(old).items() if not name.startswith("_")}
    assert {name: value for name, value in vars(fresh).items() if not name.startswith("_")} == plain
    assert fresh._qkv_same_embed_dim == old._qkv_same_embed_dim


def test_inputs_that_are_one_tensor_stay_one():
    new, seen = ProjectedAttention(attention_of()), []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(new, name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, memory = torch.randn(L, B, E).double(), torch.randn(S, B, E).double()
    new(x, x, x)
    new(x, memory, memory)
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is not seen[4] is seen[5]
    assert [each.shape[:2] for each in seen] == [(B, L)] * 4 + [(B, S)] * 2


def test_nested_tensors_are_taken_as_torch_takes_them():
    old = attention_of(batch_first=True).eval()
    new = ProjectedAttention(old)
    x = torch.nested.nested_tensor([torch.randn(n, E).double() for n in (3, 5, 1)])
    with torch.no_grad():
        expected, found = (module(x, x, x, need_weights=False)[0] for module in (old, new))
    assert found.is_nested
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="nested tensors need batch_first"):
        new(x, x, torch.nested.nested_tensor(list(x.unbind())))


@pytest.mark.parametrize(
    ("given", "error", "reason"),
    [
        ({"is_causal": True}, RuntimeError, "attn_mask must be given too"),
        ({"attn_mask": torch.zeros(1, S)}, ValueError, r"attn_mask is \(1, 5\), but must be \(4, 5\) or \(6, 4, 5\)"),
        ({"key_padding_mask": torch.zeros(1, S)}, ValueError, r"\(1, 5\), but must be \(3, 5\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int)}, TypeError, r"torch.int32, but must be torch.bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(given, error, reason):
    new = ProjectedAttention(attention_of(batch_first=True))
    with pytest.raises(error, match=reason):
        new(*inputs_of(new), **given)


@pytest.mark.parametrize("compressed", [0, 1])
def test_encoders_do_not_use_fused_kernels_for_low_rank_weights(monkeypatch, compressed):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(B, L, E), torch.arange(L).expand(B, L) >= torch.tensor([[4], [2], [3]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
    project(encoder, [f"layers.{compressed}.self_attn.v_proj"])
    assert [name for name, _ in projected(encoder)] == [f"layers.{compressed}.self_attn"]
    attention = encoder.layers[compressed].self_attn
    W = attention.v_proj
    U, s, V = torch.linalg.svd(W.weight.detach())
    attention.v_proj = LowRankLinear.from_factors(U * s, V, W.bias.detach())
    monkeypatch.setattr(LowRankLinear, "weight", property(lambda _: pytest.fail("the dense weight was made")))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])
        torch.testing.assert_close(copy.deepcopy(encoder)(x, src_key_padding_mask=padding), found)


class Scaled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)[0], None


def quantized():
    module = nn.MultiheadAttention(E, H)
    module.out_proj = nn.Linear(E, E)
    return module


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Scaled(E, H), "Scaled may compute something else"),
        (lambda: nn.utils.parametrizations.spectral_norm(attention_of(), "in_proj_weight"), "may compute something"),
        (quantized, "not those that nn.MultiheadAttention makes"),
        (attention_of, None),
    ],
)
def test_attentions_that_are_not_torchs_are_named(build, reason):
    fault = fault_of(build())
    assert fault is None if reason is None else reason in fault


def test_what_is_made_from_it_requires_the_same_gradients():
    old = attention_of()
    old.in_proj_weight.requires_grad_(requires_grad=False)
    old.out_proj.bias.requires_grad_(requires_grad=False)
    flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    assert {
        name: parameter.requires_grad for name, parameter in ProjectedAttention(old).packed().named_parameters()
    } == flags


def test_nested_sequences_run_hooks_once_and_weights_have_the_type_of_torch():
    old = nn.MultiheadAttention(E, H, batch_first=True).eval()
    new, calls = ProjectedAttention(old), []
    new.register_forward_hook(lambda *_: calls.append(1))
    new(*[torch.nested.as_nested_tensor([torch.randn(3, E), torch.randn(2, E)])] * 3)  # one tensor, three times
    assert len(calls) == 1
    x = torch.randn(B, L, E)
    mask = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    with torch.autocast("cpu", torch.bfloat16):
        (expected, weights), (output, own) = old(x, x, x, attn_mask=mask), new(x, x, x, attn_mask=mask)
    assert own.dtype == weights.dtype
    assert output.dtype == expected.dtype
    torch.testing.assert_close(own, weights, rtol=2e-2, atol=2e-2)


def test_it_can_be_traced():
    new, x = ProjectedAttention(attention_of(batch_first=True)).eval(), torch.randn(B, L, E).double()
    traced = torch.jit.trace(new, (x, x, x))
    torch.testing.assert_close(traced(x, x, x), new(x, x, x))
