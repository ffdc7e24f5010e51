"""Recurrent modules of torch with a linear layer for each matrix, instead of parameters that they read themselves.

`nn.LSTM`, `nn.GRU` and `nn.RNN` hold their matrices as parameters such as `weight_ih_l0`, and pass them to fused
loops. `RecurrentLayers` computes the same with linear layers.

Shapes: B sequences of T positions with n numbers each; H hidden numbers, and g H before the gates (g = 4 for LSTM, 3
for GRU, 1 for RNN). Imports only torch and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from zssvd_lightning.layers.apart.factors import factors_of, runs_alone
from zssvd_lightning.layers.base import take_after, take_over, type_of

FUSED: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
"""Fused loops of torch by the `mode` of a module."""

LARGE = 2**19
"""Numbers of a dense matrix from which two factors at every position take less time on a CPU than torch's loop."""

LISTS = ("_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights")
"""Attributes in which torch's recurrent modules list their parameters."""

Input = Tensor | PackedSequence
States = tuple[Tensor, ...]
"""States of a layer at one position: the hidden one (B, H) and, for LSTM, that of the cells (B, H)."""


class Steps(NamedTuple):
    """Layout of the sequences."""

    time: int
    """Dimension of the positions, or 0 for a packed sequence."""
    sizes: list[int] | None
    """Number of sequences that reach each position, for a packed sequence."""

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the rows of each position."""
        return list(x.unbind(self.time) if self.sizes is None else torch.split(x, self.sizes))

    def join(self, rows: list[Tensor]) -> Tensor:
        """Undo `split`."""
        return torch.stack(rows, self.time) if self.sizes is None else torch.cat(rows)

    def turned(self, x: Tensor) -> Tensor:
        """Return the sequences with their positions in reverse order."""
        if self.sizes is None:
            return x.flip(self.time)
        starts = [0, *accumulate(self.sizes)]
        lengths = [sum(size > row for size in self.sizes) for row in range(self.sizes[0])]
        places = [starts[lengths[row] - 1 - t] + row for t, size in enumerate(self.sizes) for row in range(size)]
        return x[torch.tensor(places, device=x.device)]


class Step(nn.Module):
    """One step of a recurrence. It has no parameters."""

    def forward(self, layer: nn.Module, h: Tensor, position: int) -> Tensor:
        """Return the outputs of `layer` for states h (b, H) of the first b sequences at a position."""
        output: Tensor = layer(h)
        return output


class RecurrentLayers(nn.Module):
    """Recurrent module with linear layers, in place of an `nn.LSTM`, `nn.GRU` or `nn.RNN`.

    It has the signature, settings and hooks of the replaced module. It runs torch's fused loop for each layer and
    direction: low-rank factors of `ih` are applied before the loop, and those of `hh` and `hr` are multiplied out for
    it. On a CPU, a low-rank layer for states whose dense matrix has `LARGE` numbers or more is called at every position
    instead, and so are layers in 8 bits, or with hooks or adapters.

    Args:
        old: the recurrent module; see `fault_of`. The linear layers have its parameters.

    Attributes:
        ih_l0: linear layer (g H, n) for the inputs of the first layer, or the compressed layer in its place. Those of
            further layers and of the reverse direction are named as the parameters are, such as `ih_l1_reverse`.
        hh_l0: the same (g H, H) for its states.
        hr_l0: the same (proj_size, H) for the projection, if there is one.
        origin: class of the replaced module, whose settings are attributes too.
        by_steps: True to call the layers at every position in any case.

    Example:
        >>> output, (h, c) = RecurrentLayers(nn.LSTM(3, 5, batch_first=True))(torch.randn(2, 7, 3))
        >>> output.shape, h.shape
        (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]))
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    origin: type[nn.RNNBase]
    by_steps: bool

    def __init__(self, old: nn.RNNBase) -> None:
        super().__init__()
        take_over(self, old, leave_out=LISTS)
        self.origin, self.by_steps = type(old), False
        for name in layers_of(old):
            W = getattr(old, f"weight_{name}")
            layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
            layer.weight = W
            layer.bias = getattr(old, f"bias_{name}", None)  # type: ignore[assignment]
            self.add_module(name, layer.train(old.training))
        self.step = Step().train(old.training)

    def __getattr__(self, name: str) -> Any:
        """Return a matrix or bias under the name that it has in the replaced module. For code that reads it."""
        kind, _, layer = name.partition("_")
        if kind in ("weight", "bias") and layer in self._modules:
            return getattr(self._modules[layer], kind)
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no layout of the parameters that fused loops prefer."""

    def forward(self, input: Input, hx: Any = None) -> tuple[Input, Any]:  # noqa: A002  as torch calls it
        """Return outputs and last states as the replaced module does, for the same arguments.

        Raises:
            ValueError: the input has another number of dimensions than 2 or 3, or states do not fit.
        """
        if isinstance(input, PackedSequence):
            return self._on_packed(input, hx)
        x, steps = input, Steps(1 if self.batch_first else 0, None)
        if x.dim() not in (2, 3):
            raise ValueError(f"the input is {tuple(x.shape)}, but must be (T, n), (B, T, n), (T, B, n) or packed")
        single, across = x.dim() == 2, 1 - steps.time
        x = x.unsqueeze(across) if single else x
        x, last = self._through_layers(x, self._states(hx, x.shape[across], single, x), steps)
        if single:
            x, last = x.squeeze(across), tuple(state.squeeze(1) for state in last)
        return x, last if self.mode == "LSTM" else last[0]

    def _on_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Return outputs and last states for packed sequences. States are in the order from before the packing."""
        steps = Steps(0, packed.batch_sizes.tolist())
        states = self._states(hx, int(packed.batch_sizes[0]), False, packed.data)
        if hx is not None and packed.sorted_indices is not None:
            states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        x, last = self._through_layers(packed.data, states, steps)
        if packed.unsorted_indices is not None:
            last = tuple(state.index_select(1, packed.unsorted_indices) for state in last)
        y = PackedSequence(x, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return y, last if self.mode == "LSTM" else last[0]

    def _states(self, hx: Any, B: int, single: bool, x: Tensor) -> States:
        """Return the first states of all layers and directions (D, B, H), which are zero unless they are given."""
        count, sizes = self.num_layers * (1 + self.bidirectional), [self.proj_size or self.hidden_size]
        sizes += [self.hidden_size] if self.mode == "LSTM" else []
        if hx is None:
            return tuple(x.new_zeros(count, B, size) for size in sizes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        given = tuple(state.unsqueeze(1) if single and state.dim() == 2 else state for state in given)
        expected = [(count, B, size) for size in sizes]
        if [tuple(state.shape) for state in given] != expected:
            raise ValueError(f"states are {[tuple(s.shape) for s in given]}, but must be {expected}")
        return given

    def _through_layers(self, x: Tensor, states: States, steps: Steps) -> tuple[Tensor, States]:
        """Return the outputs of the last layer, and the last states of all (D, B, H)."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        last = []
        for number in range(self.num_layers):
            outputs = []
            for direction, end in enumerate(ends):
                place = number * len(ends) + direction
                found, end_states = self._run(f"l{number}{end}", x, tuple(s[place] for s in states), steps)
                outputs.append(found)
                last.append(end_states)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if self.dropout and number < self.num_layers - 1:
                x = functional.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _run(self, name: str, x: Tensor, states: States, steps: Steps) -> tuple[Tensor, States]:
        """Return the outputs of one layer in one direction, and its last states."""
        layers: list[Any] = [
            self._modules[part] for kind in ("ih", "hh", "hr") if (part := f"{kind}_{name}") in self._modules
        ]
        reverse = name.endswith("_reverse")
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None  # noqa: SLF001
        numbers = 0 if traced or isinstance(layers[1], nn.Linear) else layers[1].out_features * layers[1].in_features
        pays = x.device.type == "cpu" and numbers >= LARGE
        if self.by_steps or pays or not all(map(runs_alone, layers)):
            return self._step_by_step(layers, x, states, steps, reverse=reverse)
        return self._fused(layers, x, states, steps, reverse=reverse)

    def _fused(
        self, layers: list[Any], x: Tensor, states: States, steps: Steps, *, reverse: bool
    ) -> tuple[Tensor, States]:
        """Run torch's loop, by dense matrices of the states."""
        (up, down), *others = map(factors_of, layers)
        if up is not None:
            x = functional.linear(x, down)
        weights = [down if up is None else up, *(D if U is None else U @ D for U, D in others)]
        if self.bias:
            weights[2:2] = [layers[0].bias, layers[1].bias]
        x = steps.turned(x) if reverse else x
        hx: Any = [state[None] for state in states] if self.mode == "LSTM" else states[0][None]
        rest = (self.bias, 1, 0.0, self.training, False)
        if steps.sizes is None:
            found = FUSED[self.mode](x, hx, weights, *rest, self.batch_first)
        else:
            found = FUSED[self.mode](x, torch.tensor(steps.sizes), hx, weights, *rest)
        y, *last = found
        return steps.turned(y) if reverse else y, tuple(state[0] for state in last)

    def _step_by_step(
        self, layers: list[nn.Module], x: Tensor, states: States, steps: Steps, *, reverse: bool
    ) -> tuple[Tensor, States]:
        """Call the layers: the first on all positions at once, the others at one after the other."""
        inputs = steps.split(layers[0](x))
        outputs: list[Tensor] = list(inputs)
        order = range(len(inputs) - 1, -1, -1) if reverse else range(len(inputs))
        for position in order:
            b = None if steps.sizes is None or steps.sizes[position] == steps.sizes[0] else steps.sizes[position]
            before = states if b is None else tuple(state[:b] for state in states)
            after = self._cell(inputs[position], self.step(layers[1], before[0], position), before)
            if len(layers) > 2:
                after = (self.step(layers[2], after[0], position), *after[1:])
            outputs[position] = after[0]
            pairs = zip(after, states, strict=True)
            states = after if b is None else tuple(torch.cat([new, old[b:]]) for new, old in pairs)
        return steps.join(outputs), states

    def _cell(self, x: Tensor, h: Tensor, states: States) -> States:
        """Return the states after a position, without projection, given what inputs and states add (b, g H)."""
        if self.mode == "LSTM":
            i, f, candidate, o = (x + h).chunk(4, -1)
            c = f.sigmoid() * states[1] + i.sigmoid() * candidate.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
            z = (x_z + h_z).sigmoid()
            new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
            return ((1 - z) * new + z * states[0],)
        return ((x + h).tanh() if self.mode == "RNN_TANH" else (x + h).relu(),)

    @torch.no_grad()
    def whole(self, old: nn.Module | None = None) -> nn.Module:
        """Return a module of the original class with the present weights. All matrices must be dense.

        Args:
            old: the module that was replaced, which then gets the weights; None to create one.
        """
        made = self.empty() if old is None else old
        for name in layers_of(made):
            for kind in ("weight", "bias"):
                value, place = getattr(self._modules[name], kind), getattr(made, f"{kind}_{name}", None)
                if place is not None and value.data_ptr() != place.data_ptr():
                    place.copy_(value)
        return made

    def empty(self) -> nn.Module:
        """Return a module of the original class, whose parameters have no values."""
        settings: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
        }
        settings |= {"proj_size": self.proj_size} if self.mode == "LSTM" else {}
        settings |= {"nonlinearity": self.mode.removeprefix("RNN_").lower()} if self.mode.startswith("RNN_") else {}
        first: Any = self._modules["ih_l0"]
        new: Any = self.origin(**settings, device="meta", dtype=type_of(first))
        new.to_empty(device=next(first.parameters()).device)
        take_over(new, self, leave_out=("origin", "by_steps"))
        for name in layers_of(new):
            holder = nn.Module()
            for kind in ("weight", "bias"):
                holder.register_parameter(kind, getattr(new, f"{kind}_{name}", None))
            take_after(holder, self._modules[name])  # type: ignore[arg-type]
        made: nn.Module = new
        return made

    def extra_repr(self) -> str:
        """Return the settings for `print(model)`, as the replaced module does."""
        told: str = self.origin.extra_repr(self)  # type: ignore[arg-type]
        return told


def layers_of(module: nn.Module) -> list[str]:
    """Return the names that the linear layers of a recurrent module get, relative to the module."""
    names: list[str] = module._flat_weights_names  # type: ignore[assignment]  # noqa: SLF001
    return [name.removeprefix("weight_") for name in names if name.startswith("weight_")]


def fault_of(module: nn.Module) -> str | None:
    """Return why a recurrent module cannot be `RecurrentLayers`; None if it can."""
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN) or "forward" in vars(module):
        return f"{type(module).__name__} may compute something else than nn.LSTM, nn.GRU or nn.RNN"
    if list(module._parameters) != module._flat_weights_names or module._modules or module._buffers:  # noqa: SLF001
        return f"its parameters are not those that nn.{type(module).__name__} makes"
    return None


def separate_recurrences(model: nn.Module, names: Iterable[str]) -> None:
    """Replace recurrent modules in which layers of these names would be by modules of linear layers, everywhere."""
    wanted, made = set(names), dict[int, RecurrentLayers]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase) or fault_of(module) is not None:
            continue
        if any(f"{name}.{part}" in wanted for part in layers_of(module)):
            made[id(module)] = RecurrentLayers(module)
    for parent in list(model.modules()):
        for leaf, module in list(parent._modules.items()):  # noqa: SLF001  named_children leaves out repeated ones
            if id(module) in made:
                setattr(parent, leaf, made[id(module)])


def recurrences(model: nn.Module) -> Iterator[tuple[str, RecurrentLayers]]:
    """Yield the name and module of every recurrent module that has linear layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RecurrentLayers))
