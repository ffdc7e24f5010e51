import pytest
import torch
from support.models import FAMILIES, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from zssvd_lightning import LowRankLinear
from zssvd_lightning.errors import TargetError
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import find_targets


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_every_family_are_found_in_module_order(family):
    model = FAMILIES[family].build()
    targets = find_targets(model)
    assert len(targets) == FAMILIES[family].targets
    order = [name for name, _ in model.named_modules() if name in targets]
    assert list(targets) == order


def test_conv1d_is_seen_with_outputs_first():
    target = find_targets(tiny_gpt2())["transformer.h.0.attn.c_attn"]
    assert target.shape == (96, 32)
    x = torch.randn(5, 32)
    torch.testing.assert_close(target.module(x), x @ target.weight.T + target.module.bias)


def test_assigning_writes_into_the_model():
    target = find_targets(tiny_gpt2())["transformer.h.0.mlp.c_fc"]
    W = torch.randn(target.shape)
    target.assign(W)
    assert torch.equal(target.module.weight, W.T)


@pytest.mark.parametrize(
    ("include", "ignore", "count"),
    [
        (["q_proj", "k_proj"], None, 4),
        (["*.layers.0.*"], None, 7),
        ("q_proj", None, 2),
        ([r"re:.*\.(gate|up)_proj"], None, 4),
        (None, ["*.layers.1.*"], 7),
        (["*proj*"], ["down_proj"], 12),
    ],
)
def test_patterns(include, ignore, count):
    assert len(find_targets(tiny_llama(), include, ignore)) == count


@pytest.mark.parametrize(
    ("build", "include", "reason"),
    [
        (tiny_llama, "lm_head", "tied"),
        (lambda: tiny_llama(tie_word_embeddings=False), "lm_head", "output embedding"),
        (tiny_bert, "cls.predictions.decoder", "tied"),
        (tiny_llama, "embed_tokens", "table lookup"),
        (tiny_llama, "model.layers.0.mlp", "only nn.Linear"),
        (lambda: nn.Sequential(nn.Linear(9, 1), nn.Linear(1, 9)), "0", "even rank 1"),
        (lambda: nn.Sequential(LowRankLinear(9, 9, 2)), "0.up", "low-rank already"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "part of the parameters"),
    ],
)
def test_asking_for_what_cannot_be_factorized_says_why(build, include, reason):
    with pytest.raises(TargetError, match=reason):
        find_targets(build(), [include])


def test_untied_head_is_left_alone_by_default():
    assert "lm_head" not in find_targets(tiny_llama(tie_word_embeddings=False))


def test_two_linears_that_share_a_weight_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert list(find_targets(model)) == ["2"]


@pytest.mark.parametrize(
    ("model", "include", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3)), None, "no layer to compress: 0 linear"),
        (tiny_llama(), ["q_prj"], "matches no module; did you mean"),
        (tiny_llama(), ["re:("], "regular expression"),
    ],
)
def test_nothing_to_compress_is_an_error(model, include, message):
    with pytest.raises(TargetError, match=message):
        find_targets(model, include)


def test_ignoring_everything_is_an_error():
    with pytest.raises(TargetError, match="no layer to compress"):
        find_targets(tiny_llama(), None, ["*"])


def test_a_module_in_two_places_is_one_target_and_replaced_in_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": shared})
    assert len(find_targets(model)) == 1
    new = nn.Identity()
    replace_module(model, shared, new)
    assert model["a"][0] is new
    assert model["b"] is new
    assert model["c"] is new


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(8), lambda: nn.LazyConv1d(8, 3)])
def test_layers_without_a_shape_yet_are_refused_by_name(lazy):
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(lazy()))
    with pytest.raises(TargetError, match=r"1\.0\.weight has no shape yet; run one batch"):
        find_targets(model)


def test_layers_that_got_their_shape_are_found():
    model = nn.Sequential(nn.LazyLinear(16))
    model(torch.randn(2, 16))
    assert list(find_targets(model)) == ["0"]
