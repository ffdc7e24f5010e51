"""Compression of attentions of torch from one end to the other, and what stays as it is."""

import copy

import pytest
import torch
from support.attention import Sequences, loss_of, sequence_batches
from support.models import assert_same_state, state_of
from torch import nn
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from zssvd_lightning import (
    CompressionConfig,
    compress,
    from_pretrained,
    load_state_dict,
    merge,
    save_pretrained,
)
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.errors import BudgetError, CalibrationError, TargetError
from zssvd_lightning.layers.apart.attention import ProjectedAttention, projected
from zssvd_lightning.model.apart.attention import ATTENTION
from zssvd_lightning.model.coverage import BY_CHOICE
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.4, "progress": False, "corrections": 0, "loss": loss_of}
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
SELF = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.self_attn")
ALL = (*SELF, "decoder.multihead_attn")


def tiny(*, batch_first=True):
    torch.manual_seed(0)
    return Sequences(batch_first).eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(batch["x"], batch["attention_mask"])


@pytest.mark.parametrize(("storage", "batch_first"), [("factors", False), ("pivoted", True), ("hq", True)])
def test_every_storage_a_second_compression_and_the_weights_in_a_dense_model(storage, batch_first):
    model, batches = tiny(batch_first=batch_first), sequence_batches()
    dense, settings = copy.deepcopy(model), QUICK | {"storage": storage}
    report = compress(model, batches, **settings | {"prune_ratio": 0.6 if storage == "hq" else 0.4})
    assert report.reached >= report.asked
    assert report.layers.keys() >= {f"{name}.{part}" for name in ALL for part in PARTS}
    assert [name for name, _ in projected(model)]
    assert model.encoder.use_nested_tensor is False
    expected = logits(model, batches[0])
    fresh = tiny(batch_first=batch_first)
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), expected)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in fresh.parameters())
    load_state_dict(fresh, dense.state_dict())
    assert str(fresh) == str(dense)
    assert fresh.encoder.use_nested_tensor == batch_first
    torch.testing.assert_close(logits(fresh, batches[0]), logits(dense, batches[0]))
    if storage != "hq":
        assert compress(model, batches, **settings | {"prune_ratio": 0.6}).reached >= 0.6
        expected = logits(model, batches[0])
    merge(model)
    assert str(model) == str(dense)
    assert model.encoder.use_nested_tensor == batch_first
    torch.testing.assert_close(logits(model, batches[0]), expected, rtol=1e-4, atol=1e-5)


def test_both_layouts_give_the_same_and_other_attentions_stay_whole():
    counted = {}
    for batch_first in (True, False):
        model, batches = tiny(batch_first=batch_first), sequence_batches()
        report = compress(model, batches, **QUICK | {"preset": "svd-llm", "include": "layers.0.self_attn.*"})
        counted[batch_first] = report.layers["encoder.layers.0.self_attn.q_proj"], ranks_of(model)
        whole = [name for name in ALL if name not in dict(projected(model))]
        assert whole == [*ALL[1:]]
        assert any(part.what == BY_CHOICE for part in report.coverage.left_alone)
    assert counted[True] == counted[False]


def statistics_of(model, batches):
    config = CompressionConfig(metric="two_sided", selection="curvature", corrections=0)
    return calibrate(model, batches, config, loss=loss_of, progress=False)


def test_padding_is_left_out_in_both_layouts():
    """Padding is large, so that a second moment with some of it is another."""
    batches = sequence_batches(2)
    for batch in batches:
        batch["x"][~batch["attention_mask"]] *= 20
    one, other = (statistics_of(tiny(batch_first=batch_first), batches) for batch_first in (True, False))
    assert one.tokens == other.tokens
    assert one.tokens["encoder.layers.0.linear1"] == 2 * int(batches[0]["attention_mask"].sum())
    for sums in ("input_sums", "output_sums"):
        torch.testing.assert_close(dict(getattr(one, sums)), dict(getattr(other, sums)), rtol=1e-4, atol=1e-5)


def test_batches_whose_layout_cannot_be_told_are_refused():
    (batch,) = sequence_batches(1)
    square = {name: value[:, :6] if value.dim() > 1 else value for name, value in batch.items()}
    with pytest.raises(CalibrationError, match=r"batch 1 has padding and as many sequences as positions \(6\)"):
        statistics_of(tiny(batch_first=False), [square])
    whole = {**square, "attention_mask": torch.ones(6, 6, dtype=torch.bool)}
    assert statistics_of(tiny(batch_first=False), [whole]).tokens["read"] == 36
    assert statistics_of(tiny(), [square]).tokens["read"] == int(square["attention_mask"].sum())


class Twice(nn.Module):
    """One attention, first to the sequence itself, then from one half of it to the other."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x, counts):
        h = self.attention(x, x, x)[0]
        return self.head(self.attention(h[:, :2], h, x)[0].mean(1))


def test_an_attention_to_itself_and_to_others_has_a_second_moment_for_each_matrix():
    torch.manual_seed(0)
    model, batches = Twice(), [{**batch, "attention_mask": None} for batch in sequence_batches(2)]
    expected = dict.fromkeys(PARTS[:3], 0)
    for batch in batches:
        x = batch["x"]
        h = model.attention(x, x, x)[0].detach()
        for part, second in zip(PARTS, (h[:, :2], h, x), strict=False):
            expected[part] = expected[part] + sum(rows.flatten(0, 1).T @ rows.flatten(0, 1) for rows in (x, second))
    found = statistics_of(model, batches)
    for part, total in expected.items():
        torch.testing.assert_close(found.input_sums[f"attention.{part}"], total, rtol=1e-4, atol=1e-4)
    assert found.tokens["attention.q_proj"] == 2 * 6 * (7 + 2)


def test_what_cannot_be_taken_apart_is_named(caplog):
    model, batches = tiny(), sequence_batches()
    first, second = (layer.self_attn for layer in model.encoder.layers)
    first.in_proj_weight = second.in_proj_weight
    model.decoder.self_attn.out_proj = nn.Linear(16, 16)
    report = compress(model, batches, **QUICK)
    assert "attentions of torch are not compressed (encoder.layers.0.self_attn, encoder.layers.1" in caplog.text
    assert "tied to those of another module" in caplog.text
    assert "not those that nn.MultiheadAttention makes" in caplog.text
    assert [name for name, _ in projected(model)] == ["decoder.multihead_attn"]
    left = {part.what: part.parameters for part in report.coverage.left_alone}
    assert left["attentions of torch: its parameters are tied to those of another module"] == (3 + 2) * 256
    for pattern in ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj"):
        with pytest.raises(TargetError, match="part of the parameters of MultiheadAttention"):
            compress(model, batches, **QUICK | {"include": pattern})
    with pytest.raises(TargetError, match="no layer to compress"):
        compress(nn.MultiheadAttention(8, 2), batches, **QUICK)


def test_an_attention_that_computes_something_else_fails_the_proof(monkeypatch):
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    new = ProjectedAttention(attention)
    assert ATTENTION.difference(attention, new) is None
    monkeypatch.setattr(new, "num_heads", 4)
    assert "other outputs" in ATTENTION.difference(attention, new) or "returns" in ATTENTION.difference(attention, new)


def test_the_model_is_as_before_after_an_error_and_without_a_compressed_matrix():
    model, batches = tiny(), sequence_batches()
    before, modules = state_of(model), dict(model.named_modules())
    expected = model.state_dict().keys()
    settings = [vars(module).copy() for module in modules.values()]
    with pytest.raises(BudgetError):
        compress(model, batches, **QUICK | {"prune_ratio": 0.99, "min_rank_fraction": 0.9})
    stand_ins = StandIns(model)
    with stand_ins.meanwhile():
        assert [name for name, _ in projected(model)] == list(ALL)
        assert model.encoder.use_nested_tensor is False
        weights = model.state_dict()
        stand_ins.write_low_rank(weights)
        assert weights.keys() == expected
    assert dict(model.named_modules()) == modules
    assert [vars(module).keys() for module in modules.values()] == [each.keys() for each in settings]
    assert model.encoder.use_nested_tensor is True
    assert_same_state(before, state_of(model))


def test_block_by_block_gives_the_same():
    models = [tiny(), tiny()]
    for model, memory in zip(models, ("whole", "blocks"), strict=True):
        compress(model, sequence_batches(), memory=memory, **QUICK | {"preset": "svd-llm"})
    assert ranks_of(models[0]) == ranks_of(models[1])
    batch = sequence_batches(1)[0]
    torch.testing.assert_close(logits(models[0], batch), logits(models[1], batch), rtol=1e-3, atol=1e-4)


def test_a_model_of_transformers_is_saved_and_loaded_with_and_without_its_code(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes)).eval()
    batches = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]

    def loss(model, batch):
        return model(**batch).pooler_output.square().mean()

    compress(model, batches, **QUICK | {"loss": loss, "terms": lambda _: 4})
    (name,) = [name for name, _ in projected(model)]
    assert any(layer.startswith(f"{name}.") for layer in ranks_of(model))
    with torch.no_grad():
        expected = model(**batches[0]).pooler_output
        for folder, alone in (("saved", False), ("alone", True)):
            save_pretrained(model, tmp_path / folder, self_contained=alone)
            path = tmp_path / folder
            loaded = AutoModel.from_pretrained(path, trust_remote_code=True) if alone else from_pretrained(path)
            assert loaded.state_dict().keys() == model.state_dict().keys()
            torch.testing.assert_close(loaded.eval()(**batches[0]).pooler_output, expected)


def test_a_compressed_network_runs_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batches = tiny(), sequence_batches()
    compress(model, batches, **QUICK)
    given = batches[0]["x"], batches[0]["attention_mask"]
    torch.onnx.export(model, given, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, [each.numpy() for each in given], strict=True)))
    torch.testing.assert_close(torch.tensor(found), logits(model, batches[0]), rtol=1e-4, atol=1e-5)
