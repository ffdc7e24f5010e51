"""Compression of mixtures of experts from one end to the other, and what stays as it is."""

import copy

import pytest
import torch
from support.experts import FAMILIES, experts_in, tiny_experts
from support.models import assert_same_state, padded_batches, state_of, token_batches
from transformers import AutoModel

from zssvd_lightning import (
    CompressionConfig,
    compress,
    from_pretrained,
    load_state_dict,
    merge,
    save_pretrained,
)
from zssvd_lightning.compression.pipeline import calibrate, coverage_of, plan
from zssvd_lightning.errors import BudgetError, LeftDenseWarning, TargetError
from zssvd_lightning.layers.apart.experts import ExpertList, is_stacked
from zssvd_lightning.layers.int8 import EightBitLinear
from zssvd_lightning.model.apart.experts import EXPERTS
from zssvd_lightning.model.coverage import BY_CHOICE
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.4, "progress": False, "corrections": 0}


def logits(model, batch):
    """Logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        output = model.eval()(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_saved_loaded_generated_and_merged(family, tmp_path):
    torch.manual_seed(0)
    model, batches = tiny_experts(family), token_batches()
    kinds = [type(module) for module in experts_in(model)]
    stacked = sum(p.numel() for m in experts_in(model) if is_stacked(m) for p in m.parameters() if p.dim() == 3)
    report = compress(model, batches, **QUICK | {"preset": "best"})
    assert report.reached >= 0.4
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in report.layers.items() if ".experts." in name}
    assert sum(sizes.values()) == stacked > 0.3 * report.coverage.model_parameters
    assert not any("stacked" in part.what or "experts" in part.what for part in report.coverage.left_alone)
    assert any(".experts." in name for name in ranks_of(model))
    expected = logits(model, batches[0])

    save_pretrained(model, tmp_path / "saved", report=report)
    loaded = from_pretrained(tmp_path / "saved")
    assert ranks_of(loaded) == ranks_of(model)
    assert torch.equal(logits(loaded, batches[0]), expected)
    base = AutoModel.from_pretrained(tmp_path / "saved").eval()
    inputs = {"input_ids": batches[0]["input_ids"]}
    assert torch.equal(logits(base, inputs), logits(loaded.model, inputs))
    prompt = batches[0]["input_ids"][:, :5]
    generated = loaded.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(prompt, max_new_tokens=4, do_sample=False))
    assert generated.shape == (4, 9)

    merge(loaded)
    assert [type(module) for module in experts_in(loaded)] == kinds
    torch.testing.assert_close(logits(loaded, batches[0]), expected, rtol=1e-3, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    names = tiny_experts(family)
    names.save_pretrained(tmp_path / "names")
    dense = type(loaded).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, batches[0]), expected, rtol=1e-3, atol=1e-5)
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("*/model.safetensors"))]
    assert sizes[0] == sizes[1] > sizes[2]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dense_and_stacked_experts_beside_compressed_ones_load(family, tmp_path):
    """Experts of one layer are compressed in part, those of the other not at all."""
    torch.manual_seed(0)
    model, batches = tiny_experts(family), token_batches()
    report = compress(model, batches, include=["layers.1.*.experts.[01].*", "q_proj"], **QUICK)
    first, second = experts_in(model)
    assert is_stacked(first)
    assert isinstance(second, ExpertList)
    assert not any(".experts.2" in name or "layers.0.mlp" in name for name in report.layers)
    for self_contained in (False, True):
        save_pretrained(model, tmp_path / "saved", self_contained=self_contained)
        loaded = from_pretrained(tmp_path / "saved")
        assert is_stacked(experts_in(loaded)[0])
        assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize("storage", ["factors", "pivoted", "hq"])
def test_every_storage_and_a_second_compression(storage, tmp_path):
    torch.manual_seed(0)
    model, batches = tiny_experts(), token_batches()
    compress(model, batches, prune_ratio=0.6 if storage == "hq" else 0.3, storage=storage, progress=False)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved"), batches[0]), logits(model, batches[0]))
    if storage != "hq":
        before = ranks_of(model)
        report = compress(model, batches, prune_ratio=0.5, storage=storage, progress=False)
        assert report.reached >= 0.5
        assert all(rank <= before.get(name, 99) for name, rank in ranks_of(model).items())


@pytest.mark.parametrize("memory", ["whole", "blocks"])
def test_experts_that_stay_dense_in_8_bits_are_converted(memory, tmp_path):
    torch.manual_seed(0)
    model, batches = tiny_experts("qwen3_moe"), token_batches()
    settings = {"storage": "mixed", "rank_multiple": 1, "metric": "two_sided", "selection": "curvature"}
    report = compress(model, batches, **QUICK | settings | {"preset": "zs-svd-line-search", "memory": memory})
    rounded = {name for name, layer in report.layers.items() if layer.in_8_bits}
    dense = {name for name in rounded if report.layers[name].rank is None}
    assert any(".experts." in name for name in dense)
    assert {name for name, module in model.named_modules() if isinstance(module, EightBitLinear)} == rounded
    expected = logits(model, batches[0])
    save_pretrained(model, tmp_path / "saved", report=report)
    assert torch.equal(logits(from_pretrained(tmp_path / "saved"), batches[0]), expected)


def test_weights_load_into_dense_and_compressed_models():
    torch.manual_seed(0)
    model, batches = tiny_experts("gpt_oss"), token_batches()
    dense = copy.deepcopy(model)
    compress(model, batches, **QUICK)
    fresh, expected = tiny_experts("gpt_oss"), logits(model, batches[0])
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), expected)
    load_state_dict(model, dense.state_dict())
    assert all(map(is_stacked, experts_in(model)))
    torch.testing.assert_close(logits(model, batches[0]), logits(dense, batches[0]))
    before = state_of(fresh)
    with pytest.raises(Exception, match="do not belong"):
        load_state_dict(fresh, tiny_experts("mixtral").state_dict())
    assert_same_state(before, state_of(fresh))


def test_the_model_is_as_before_after_an_error_a_plan_and_a_calibration(monkeypatch):
    model, batches = tiny_experts(), token_batches()
    before, modules = state_of(model), dict(model.named_modules())
    plan(model, batches, **QUICK)
    moments = calibrate(model, batches, **QUICK)
    assert "model.layers.0.mlp.experts.0.gate_up_proj" in moments.tokens
    coverage_of(model, CompressionConfig(prune_ratio=0.4))
    with pytest.raises(BudgetError):
        compress(model, batches, **QUICK | {"prune_ratio": 0.99, "min_rank_fraction": 0.9})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zssvd_lightning.compression.engine.Compression.quantize", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(model, batches, **QUICK)
    assert dict(model.named_modules()) == modules
    assert_same_state(before, state_of(model))


def test_statistics_of_before_serve_a_compression():
    torch.manual_seed(0)
    model, batches = tiny_experts(), token_batches()
    another, moments = copy.deepcopy(model), calibrate(model, batches, **QUICK)
    compress(model, batches, statistics=moments, **QUICK)
    compress(another, batches, **QUICK)
    assert ranks_of(model) == ranks_of(another)
    assert torch.equal(logits(model, batches[0]), logits(another, batches[0]))


def test_experts_without_tokens_stay_dense_and_are_named():
    torch.manual_seed(0)
    model, batches = tiny_experts("deepseek_v3"), token_batches()
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.e_score_correction_bias[2] -= 100.0
    expected = experts_in(model)[-1].down_proj[2].clone()
    with pytest.warns(LeftDenseWarning, match=r"experts\.2\.gate_up_proj, .*saw no token"):
        report = compress(model, batches, include="experts.*", **QUICK)
    assert set(report.left_dense) == {f"model.layers.1.mlp.experts.2.{part}" for part in ("gate_up_proj", "down_proj")}
    assert torch.equal(experts_in(model)[-1].experts[2].down_proj.weight, expected)
    assert report.coverage.share < 1


@pytest.mark.parametrize("pattern", ["model.layers.*.mlp.experts.*", "experts.*.gate_up_proj", "re:.*experts.*"])
def test_patterns_leave_experts_out(pattern):
    torch.manual_seed(0)
    model, batches = tiny_experts(), token_batches()
    report = compress(model, batches, ignore=pattern, **QUICK)
    downs = {name for name in report.layers if name.endswith("down_proj")}
    assert not any("gate_up_proj" in name for name in report.layers)
    assert len(downs) == (8 if pattern.endswith("gate_up_proj") else 0)
    assert any(part.what == BY_CHOICE for part in report.coverage.left_alone)
    assert all(map(is_stacked, experts_in(model))) == (not downs)


def test_experts_that_differ_from_their_linear_layers_stay_stacked(caplog):
    torch.manual_seed(0)
    model, batches = tiny_experts(), token_batches()
    other = experts_in(model)[0]
    original = type(other).forward

    class Scaled(type(other)):
        def forward(self, *args):
            return 2 * original(self, *args)

    other.__class__ = Scaled
    assert "other outputs" in EXPERTS.difference(other, ExpertList(other))
    report = compress(model, batches, **QUICK)
    assert "stacked experts are not compressed (model.layers.0.mlp.experts; " in caplog.text
    assert type(experts_in(model)[0]) is Scaled
    (left,) = [part for part in report.coverage.left_alone if part.what.startswith("stacked experts: as separate")]
    assert left.parameters == sum(p.numel() for p in other.parameters())
    assert not any("layers.0.mlp.experts" in name for name in report.layers)
    with pytest.raises(TargetError, match="part of the parameters of Scaled"):
        compress(model, batches, include="layers.0.mlp.experts.0.down_proj", **QUICK)


def test_tied_experts_stay_stacked(caplog):
    model, batches = tiny_experts(), token_batches()
    first, second = experts_in(model)
    second.down_proj = first.down_proj
    compress(model, batches, **QUICK)
    assert "not compressed (model.layers.0.mlp.experts, model.layers.1.mlp.experts; " in caplog.text
    assert "parameters): its parameters are tied to those of another module" in caplog.text
    assert first.down_proj is second.down_proj


def test_block_by_block_gives_the_same():
    torch.manual_seed(0)
    models = [tiny_experts(output_router_logits=False)]
    models.append(copy.deepcopy(models[0]))
    for model, memory in zip(models, ("whole", "blocks"), strict=True):
        compress(model, padded_batches(), memory=memory, **QUICK)
    whole, blocks = models
    assert ranks_of(whole) == ranks_of(blocks)
    batch = token_batches(1)[0]
    torch.testing.assert_close(logits(blocks, batch), logits(whole, batch), rtol=1e-3, atol=1e-4)
