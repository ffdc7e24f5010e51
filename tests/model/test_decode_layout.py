"""Weights stored by columns: the same values, in every form of a layer, through saving, merging and compilation."""

import copy
import logging

import pytest
import torch
from support.models import tiny_llama
from torch import nn

from zssvd_lightning import arrange_for_decoding, from_pretrained, merge, save_pretrained
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.model import decode_layout
from zssvd_lightning.serialization.transformers_config import mark

FORMS = [LowRankLinear, PivotedLinear, ColumnPivotedLinear]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """Small weights are arranged like large ones."""
    monkeypatch.setattr(decode_layout, "NARROWEST", 2)


def by_columns(model):
    return {name for name, p in model.named_parameters() if p.dim() == 2 and not p.is_contiguous()}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_stay(form):
    layer = form.from_factors(torch.randn(24, 4), torch.randn(4, 8), torch.randn(24))
    other = copy.deepcopy(layer)
    assert arrange_for_decoding(other) == len(by_columns(other)) > 0
    for (name, a), b in zip(layer.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(3, 8)
    torch.compiler.reset()  # layers of other sizes, compiled before, count against its limit
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(other(x), layer(x))
        torch.testing.assert_close(other(x[:1]), layer(x[:1]))
        torch.testing.assert_close(compiled(x[:1]), layer(x[:1]))
    torch.compiler.reset()
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_only_weights_that_gain_are_arranged(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
            self.head.weight = self.embed.weight
            self.tall, self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(1, 32)
            self.half = nn.Linear(8, 32, dtype=torch.bfloat16)

    model = Tied()
    with caplog.at_level(logging.INFO, logger="zssvd_lightning"):
        assert arrange_for_decoding(model) == 1
    assert by_columns(model) == {"tall.weight"}
    total = sum(p.numel() for p in model.parameters())
    assert f"1 weights with {100 * 256 / total:.0f}% of all numbers" in caplog.text
    address = model.tall.weight.data_ptr()
    assert arrange_for_decoding(model) == 1
    assert model.tall.weight.data_ptr() == address


def test_it_is_saved_and_merged_as_before(tmp_path):
    model, layers = tiny_llama(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            m, n = layer.weight.shape
            form = FORMS[len(layers) % len(FORMS)]
            layers[name] = form.from_factors(torch.randn(m, 4) / 8, torch.randn(4, n) / 8, None)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    mark(model)
    model.eval()
    plain = copy.deepcopy(model)
    assert arrange_for_decoding(model) > 0
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert not by_columns(loaded)
    for (name, a), b in zip(plain.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    merge(model)
    merge(plain)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_other_objects_are_refused():
    with pytest.raises(TargetError, match="dict"):
        arrange_for_decoding({})
