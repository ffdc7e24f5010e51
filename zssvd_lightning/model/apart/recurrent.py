"""Recurrent modules of torch that have linear layers during a compression. The replacement is proved."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from zssvd_lightning.layers.apart.recurrent import RecurrentLayers, fault_of, layers_of
from zssvd_lightning.model.apart.kind import Kind, difference_in

SEED = 0


class Recurrences(Kind):
    """Modules of class `nn.LSTM`, `nn.GRU` and `nn.RNN`."""

    what: ClassVar[str] = "recurrent modules"
    told: ClassVar[str] = "reads its matrices itself, so that they are compressed as separate layers"
    instead: ClassVar[str] = "set recurrent to False"
    opt_in: ClassVar[str | None] = "recurrent"
    form: ClassVar[type[nn.Module]] = RecurrentLayers

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the recurrent modules that are whole."""
        return {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}

    def parts(self, module: nn.Module) -> list[str]:
        """Return the names of the layers for inputs, states and projections."""
        return layers_of(module)

    def fault(self, module: nn.Module) -> str | None:
        """Return why the class or the parameters do not fit."""
        return fault_of(module)

    def whole(self, new: RecurrentLayers, old: nn.Module | None) -> nn.Module:
        """Return the recurrent module of torch."""
        return new.whole(old)

    def only_whole(self, new: RecurrentLayers) -> str:
        """Return the name of the matrix for the inputs of the first layer."""
        return "weight_ih_l0"

    def difference(self, old: nn.Module, new: RecurrentLayers) -> str | None:
        """Compare outputs and last states for two random sequences, padded and packed, in both ways to run."""
        weight = next(new.parameters())
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(2, 4, new.input_size, generator=generator).to(weight)
        x = x if new.batch_first else x.transpose(0, 1)
        sizes = [new.proj_size or new.hidden_size, new.hidden_size][: 1 + (new.mode == "LSTM")]
        count = new.num_layers * (1 + new.bidirectional)
        states = tuple(torch.randn(count, 2, size, generator=generator).to(weight) for size in sizes)
        hx: Tensor | tuple[Tensor, ...] = states if new.mode == "LSTM" else states[0]
        packed = pack_padded_sequence(x, torch.tensor([2, 4]), new.batch_first, enforce_sorted=False)
        calls = [(x, hx), (packed, hx)]
        try:
            for new.by_steps in (False, True):
                if (reason := difference_in(old, new, calls, "random sequences")) is not None:
                    return reason
        finally:
            new.by_steps = False
        return None


RECURRENCES = Recurrences()
