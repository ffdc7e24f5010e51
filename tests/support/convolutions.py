"""Small convolutional networks, and batches of images for them."""

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)


def tiny_resnet() -> ResNetForImageClassification:
    """A network of transformers with batch norms, steps of 2 and kernels of size 1, 3 and 7."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).eval()


def tiny_regnet() -> RegNetForImageClassification:
    """A network of transformers with convolutions that have groups, and batch norms."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8, "layer_type": "y"}
    return RegNetForImageClassification(RegNetConfig(**sizes, num_labels=5)).eval()


def grouped_network() -> nn.Sequential:
    """A plain network with two convolutions that have groups, of which one is depthwise."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def tiny_network() -> nn.Sequential:
    """A plain network with a convolution that has groups."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def image_batches(count: int = 4, size: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of images with labels that depend on them."""
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(size, 3, 16, 16, generator=g) for _ in range(count)]
    return [{"pixel_values": x, "labels": x[:, :, 4:8, 4:8].mean((1, 2, 3)).mul(20).long() % 5} for x in images]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a plain network."""
    return cross_entropy(model(batch["pixel_values"]), batch["labels"])


class ImageClassifier(L.LightningModule):
    """The plainest module there is around a plain network."""

    def __init__(self, build: Callable[[], nn.Module] = tiny_network) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
