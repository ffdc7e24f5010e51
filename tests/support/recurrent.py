"""A small network of torch's recurrent modules, and batches of sequences with padding for it."""

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from support.attention import loss_of


class Reader(nn.Module):
    """Classifies sequences (B, T, 8) with an LSTM in both directions and a GRU."""

    def __init__(self, batch_first: bool = True, packs: bool = False) -> None:
        super().__init__()
        self.batch_first, self.packs = batch_first, packs
        self.lstm = nn.LSTM(8, 16, 2, batch_first=batch_first, bidirectional=True)
        self.gru = nn.GRU(32, 24, batch_first=batch_first)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        h = x if self.batch_first else x.transpose(0, 1)
        if self.packs:
            packed = pack_padded_sequence(h, counts.sum(1).cpu(), self.batch_first, enforce_sorted=False)
            h, _ = pad_packed_sequence(self.gru(self.lstm(packed)[0])[0], self.batch_first, total_length=x.shape[1])
        else:
            h, _ = self.gru(self.lstm(h)[0])
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head((h * counts[..., None]).mean(1))


class SequenceReader(L.LightningModule):
    """The plainest module there is around `Reader`."""

    def __init__(self, build: Callable[[], nn.Module] = Reader) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
