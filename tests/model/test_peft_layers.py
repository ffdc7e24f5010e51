"""Models on which PEFT has put adapters."""

import pytest
import torch
from support.models import assert_same_state, logits, state_of, tiny_gpt2, tiny_llama, token_batches
from torch import nn

from zssvd_lightning import compress, from_pretrained, merge, save_pretrained
from zssvd_lightning.compression.quantization import quantize
from zssvd_lightning.errors import ExportError, QuantizationError, SavedModelError, TargetError
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.model.targets import find_targets

peft = pytest.importorskip("peft")


def with_lora(model=None, **settings):
    """A model with trained LoRA, so that losing the adapter changes the logits."""
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    return peft.get_peft_model(model or tiny_llama(), peft.LoraConfig(**options))


def injected():
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny_llama())


def with_two():
    model = with_lora()
    model.add_adapter("second", peft.LoraConfig(target_modules=["up_proj"]))
    return model


def with_ia3():
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return peft.get_peft_model(tiny_llama(), config)


def compressed_at(model, prune_ratio=0.3, **settings):
    settings |= {"preset": "zs-svd-line-search", "corrections": 0, "progress": False}
    compress(model, token_batches(), prune_ratio=prune_ratio, **settings)
    return model.eval()


@pytest.mark.parametrize(
    "build",
    [
        with_lora,
        lambda: with_lora(use_dora=True),
        lambda: with_lora(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
        lambda: with_lora(target_modules=["embed_tokens"], modules_to_save=["down_proj"]),
        injected,
        with_two,
        with_ia3,
    ],
    ids=["lora", "dora", "conv1d", "modules_to_save", "injected", "two", "ia3"],
)
def test_layers_with_adapters_are_refused_with_a_remedy_and_the_model_stays_as_it_is(build):
    model = build()
    before = state_of(model)
    with pytest.raises(TargetError, match=r"adapter layer of PEFT.*merge_and_unload.*LoRARecovery"):
        compressed_at(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("pattern", ["q_proj", "*.layers.1.*", "*.base_layer", "re:.*lora_A.default"])
def test_including_a_layer_with_an_adapter_by_any_of_its_names_is_refused(pattern):
    with pytest.raises(TargetError, match="adapter layer of PEFT"):
        find_targets(with_lora(), pattern)


def test_the_remedy_works_merging_first_and_compressing_the_result(tmp_path):
    model = compressed_at(with_lora().merge_and_unload())
    save_pretrained(model, tmp_path / "model")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "model").eval()), logits(model))


def test_layers_without_adapters_can_be_compressed_and_the_others_merge_as_ever(tmp_path):
    model = compressed_at(with_lora(), ignore=["q_proj", "v_proj"])
    expected = logits(model)
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), expected)
    save_pretrained(merged, tmp_path / "model")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "model").eval()), expected)


def test_adapters_elsewhere_leave_linear_layers_as_targets():
    untied = tiny_llama(tie_word_embeddings=False)
    assert len(find_targets(with_lora(untied, target_modules=["embed_tokens"]))) == 14
    kept = with_lora(
        tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens"], modules_to_save=["lm_head"]
    )
    assert len(find_targets(kept, ignore="lm_head")) == 14


def test_what_would_not_load_is_not_saved(tmp_path):
    with pytest.raises(SavedModelError, match=r"q_proj is an adapter layer of PEFT.*merge_and_unload"):
        save_pretrained(injected(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_adapters_on_factors_are_refused_where_they_would_be_lost_and_merge_into_the_factors():
    model = compressed_at(tiny_llama(hidden_size=64))
    wrapped = with_lora(model, target_modules=r".*\.(down|up)", r=2)
    with pytest.raises(TargetError, match=r"on its factors; model = model.merge_and_unload\(\)"):
        compressed_at(wrapped, 0.5)
    with pytest.raises(ExportError, match="on its factors"):
        merge(wrapped)
    with pytest.raises(QuantizationError, match="adapter of PEFT"):
        quantize(wrapped)
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), expected)
    compressed_at(merged, 0.5)


def test_nothing_is_wrapped_without_peft(monkeypatch):
    model = with_lora()
    wrapped = [module for module in model.modules() if wraps_by_peft(module)]
    assert wrapped
    assert not any(isinstance(module, nn.Embedding) for module in wrapped)
    monkeypatch.delitem(__import__("sys").modules, "peft.tuners.tuners_utils")
    assert not any(wraps_by_peft(module) for module in model.modules())
