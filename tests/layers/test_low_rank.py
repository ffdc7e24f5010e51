import pytest
import torch
from torch import nn

from zssvd_lightning import LowRankLinear


@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_with_the_product_of_its_factors(bias):
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    b = torch.randn(6) if bias else None
    layer, x = LowRankLinear.from_factors(up, down, b), torch.randn(3, 4, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, up @ down, b))
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 6, 2)
    torch.testing.assert_close(layer.weight, up @ down)
    assert isinstance(layer.down, nn.Linear)
    assert isinstance(layer.up, nn.Linear)
    assert all(p.requires_grad for p in layer.parameters())


def test_layer_does_not_share_memory_with_the_factors_it_was_made_from():
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    layer = LowRankLinear.from_factors(up, down, None)
    up.zero_()
    assert layer.up.weight.any()


def test_layer_stands_in_where_torch_reads_weight_and_bias():
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    dense = encoder.linear1
    encoder.linear1 = LowRankLinear.from_factors(dense.weight, torch.eye(16), dense.bias)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder.train()(x))


def test_repr_tells_the_rank():
    assert "rank=2" in repr(LowRankLinear(5, 6, 2))
