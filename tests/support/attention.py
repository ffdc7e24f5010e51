"""A small transformer of torch's own layers, and batches of sequences with padding for it."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Sequences(nn.Module):
    """Classifies sequences (B, T, 8) with an encoder and a decoder of torch."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.read, self.batch_first = nn.Linear(8, 16), batch_first
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        h = self.read(x)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, src_key_padding_mask=~counts)
        first = h[:, :2] if self.batch_first else h[:2]
        return self.head(self.decoder(first, h, memory_key_padding_mask=~counts).mean(1 if self.batch_first else 0))


def sequence_batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of six sequences of seven, of which every other one ends in padding, with labels that depend on them."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.ones(6, 7, dtype=torch.bool)
    counts[::2, 5:] = False
    xs = [torch.randn(6, 7, 8, generator=g) for _ in range(count)]
    return [{"x": x, "attention_mask": counts, "labels": x[:, :5].mean((1, 2)).mul(20).long() % 5} for x in xs]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of `Sequences`."""
    return cross_entropy(model(batch["x"], batch["attention_mask"]), batch["labels"])


class SequenceClassifier(L.LightningModule):
    """The plainest module there is around `Sequences`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Sequences()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
