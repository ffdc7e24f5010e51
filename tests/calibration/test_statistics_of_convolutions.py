"""Statistics of convolutions against explicit patches and autograd, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, unfold

from zssvd_lightning import compress
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.layers.apart import convolutions

NAME = "0.kernel_matrix"
TWO_SIDED = {"metric": "two_sided", "selection": "curvature", "corrections": 0, "storage": "factors"}
QUICK = {"preset": "svd-llm", "progress": False, "convolutions": True, "include": "0"}


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def classifier(conv):
    torch.manual_seed(0)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).double()


def images(count=2):
    return [(torch.randn(3, 4, 9, 8).double(), torch.randint(5, (3,))) for _ in range(count)]


@pytest.mark.parametrize("numbers", [2**22, 200])
@pytest.mark.parametrize(
    "settings", [{"stride": 2, "padding": 1}, {"dilation": (1, 2), "padding": (0, 1)}, {"padding": "same"}], ids=str
)
def test_moments_and_gradients_are_those_of_the_patches(monkeypatch, settings, numbers):
    monkeypatch.setattr(convolutions, "PATCH_NUMBERS", numbers)
    conv = nn.Conv2d(4, 6, 3, **settings)
    model, batches = classifier(conv), images()
    moments = calibrate(model, batches, loss=loss, **QUICK | TWO_SIDED)
    assert model[0] is conv
    around = [1, 1, 1, 1] if settings["padding"] == "same" else [p for p in reversed(conv.padding) for _ in range(2)]
    A = G = B = tokens = 0
    for x, y in batches:
        X = unfold(pad(x, around), 3, dilation=conv.dilation, stride=conv.stride).transpose(1, 2).flatten(0, 1)
        kept = []
        handle = conv.register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
        batch_loss = 3 * loss(model, (x, y))
        handle.remove()
        D, g = torch.autograd.grad(batch_loss, [kept[0], conv.weight])
        D = D.flatten(2).transpose(1, 2).flatten(0, 1)
        A, B, G, tokens = A + X.T @ X, B + D.T @ D, G + g.flatten(1), tokens + len(X)
    assert moments.tokens == {NAME: tokens}
    torch.testing.assert_close(moments.input_sums[NAME], A)
    torch.testing.assert_close(moments.output_sums[NAME], B)
    torch.testing.assert_close(moments.gradient_sums[NAME], G)


def test_a_truncation_loses_what_the_singular_values_of_the_outputs_say():
    """By Eckart and Young, no rank-k kernels give outputs nearer to those of the convolution."""
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    model, batches = classifier(conv), images()
    x = torch.cat([batch[0] for batch in batches])
    Y = conv(x).detach().transpose(0, 1).flatten(1)
    compress(model, batches, loss=loss, prune_ratio=0.4, rank_multiple=1, **QUICK)
    k = model[0].kernel_matrix.rank
    found = (model[0](x).detach().transpose(0, 1).flatten(1) - Y).square().sum()
    torch.testing.assert_close(found, torch.linalg.svdvals(Y)[k:].square().sum(), rtol=1e-6, atol=0)
    W = model[0].kernel_matrix.weight.detach()
    for _ in range(20):  # no small step in the set of rank-k matrices is better
        U, V = torch.randn(6, 6).double(), torch.randn(36, 36).double()
        other = (torch.eye(6) + 1e-3 * U).double() @ W @ (torch.eye(36) + 1e-3 * V).double()
        there = nn.functional.conv2d(x, other.reshape(6, 4, 3, 3), padding=1).transpose(0, 1).flatten(1)
        assert (there - Y).square().sum() >= found


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 6, 3, padding="same"), nn.Linear(6, 5)

    def forward(self, x, attention_mask):
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2).tanh())


@pytest.mark.parametrize("numbers", [2**22, 30])
def test_positions_of_padding_do_not_count(monkeypatch, numbers):
    monkeypatch.setattr(convolutions, "PATCH_NUMBERS", numbers)
    model, x = Tagger().double(), torch.randn(3, 7, 4).double()
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    batch = {"x": x, "attention_mask": mask.long(), "labels": torch.randint(5, (3, 7)).masked_fill(~mask, -100)}

    def masked_loss(model, batch):
        scores = model(batch["x"], batch["attention_mask"])
        return cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())

    moments = calibrate(model, [batch], loss=masked_loss, **QUICK | {"include": "conv"})
    X = pad(x.transpose(1, 2), (1, 1)).unfold(2, 3, 1).transpose(1, 2).flatten(2)[mask]
    assert moments.tokens == {"conv.kernel_matrix": 13}
    torch.testing.assert_close(moments.input_sums["conv.kernel_matrix"], X.T @ X)
