"""Which subclasses of linear layers count as linear layers."""

import pytest
import torch
from support.models import token_batches
from torch import nn
from torch.nn import functional as F
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from zssvd_lightning import LowRankLinear, compress
from zssvd_lightning.errors import TargetError
from zssvd_lightning.model.linear_subclasses import is_plain_linear
from zssvd_lightning.model.targets import find_targets


class Renamed(nn.Linear):
    """The same under another name."""


class Written(nn.Linear):
    def __init__(self, n, m, bias=True):
        super().__init__(n, m, bias)
        self.note = "a setting that changes nothing"

    def forward(self, x):
        return (
            x @ self.weight.mT
            if self.bias is None
            else torch.addmm(self.bias, x.flatten(0, -2), self.weight.mT).unflatten(0, x.shape[:-1])
        )


class RenamedConv(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.01 * super().forward(x)


class ScaledByAttribute(nn.Linear):
    scale = 2.0


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.1, self.training), self.bias)


class Rounds(nn.Linear):
    def forward(self, x):
        return F.linear(x, (16 * self.weight).round() / 16, self.bias)


class CutsGradient(nn.Linear):
    def forward(self, x):
        return F.linear(x.detach(), self.weight, self.bias)


class HasBuffer(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(8))


class HasParameter(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora = nn.Parameter(torch.zeros(8))


class HasTensor(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mask = torch.ones(8, 8)


class HasChild(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.quantizer = nn.Identity()


class HasMethod(nn.Linear):
    def merge(self):
        """Something that a model may call."""


class Replaced(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class TakesMore(nn.Linear):
    def forward(self, x, scale):
        return scale * super().forward(x)


class Overridden(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.forward = lambda x: 2 * F.linear(x, self.weight, self.bias)


class OwnWeight(nn.Parameter):
    """Weights that may be in another form, as those of quantized layers."""


def quantized():
    layer = Renamed(8, 8)
    layer.weight = OwnWeight(torch.randn(8, 8))
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 8),
        Conv1D(8, 8),
        Renamed(8, 8),
        Written(8, 8),
        Written(8, 8, bias=False),
        Written(8, 8).bfloat16(),
        RenamedConv(8, 8),
        FalconLinear(8, 8),
        FalconLinear(8, 8, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_subclasses_that_compute_the_same_are_linear_layers(layer):
    before, random = layer.state_dict(), torch.get_rng_state()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert is_plain_linear(layer)
    assert list(find_targets(nn.Sequential(layer))) == ["0"]
    assert not calls
    assert layer.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    "build",
    [
        Scaled,
        ScaledByAttribute,
        NoisyInTraining,
        Rounds,
        CutsGradient,
        HasBuffer,
        HasParameter,
        HasTensor,
        HasChild,
        HasMethod,
        Replaced,
        TakesMore,
        Overridden,
        lambda *_: quantized(),
        lambda *sizes: nn.MultiheadAttention(8, 2).out_proj,
        lambda *sizes: nn.utils.parametrizations.weight_norm(nn.Linear(*sizes)),
        lambda *sizes: torch.ao.nn.qat.Linear(*sizes, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
    ],
)
def test_subclasses_that_may_compute_anything_else_are_not(build):
    model = nn.Sequential(build(8, 8), nn.Linear(8, 8))
    assert list(find_targets(model)) == ["1"]
    with pytest.raises(TargetError, match="does not compute W x"):
        find_targets(model, ["0"])


def test_a_falcon_is_compressed_in_all_its_layers():
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config)
    report = compress(model, token_batches(), prune_ratio=0.4, preset="svd-llm", progress=False)
    assert len(report.layers) == 8
    assert report.reached >= 0.4
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert model(**token_batches(1)[0]).loss.isfinite()
