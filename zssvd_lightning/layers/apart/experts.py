"""Experts of a layer as separate linear layers, instead of stacked parameters.

Models of transformers store the matrices of all experts of a layer in parameters with three dimensions, behind the
interface of `transformers.integrations.moe`. `ExpertList` computes the same with linear layers.

Shapes: E experts, n hidden features, h features inside of an expert, N tokens, K experts for each token. Imports only
torch and transformers, so that a saved folder can contain a copy of this file.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.apart.grouped_experts import can_use_operator, forward_by_operator, forward_by_stacks
from zssvd_lightning.layers.apart.stacks import Stacks
from zssvd_lightning.layers.base import own_memory, take_over
from zssvd_lightning.layers.gradients import is_eager

DOWN = "down_proj"
"""Name of the stack of matrices that write the output."""

BIAS = "_bias"
"""Suffix of the name of a stack of biases."""

FEW_ROWS, MOST_ROWS = 16, 16
"""Tokens of all experts together up to which they take less time on a CPU one by one, and mean number of tokens of each
expert above which they do; see `docs/experts.md`."""

Activation = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """Form of the parameters of a module of stacked experts. The names are those of the interface of transformers."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool
    repeats: bool = False
    """True if the module is called with the tokens once for each expert (E N, n), with zeros where it is not chosen."""


REPEATED = Layout(True, False, True, False, True)
"""Layout of experts that are not behind the interface: two stacks whose products are `torch.bmm`, as in Llama 4."""


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a module with the attributes that transformers' `use_experts_implementation` sets.

    A module without them has layout `REPEATED` if it has its two stacks, an activation, and a forward of one argument.
    """
    flags: list[Any] = [getattr(module, name, None) for name in Layout._fields[:4]]
    if all(isinstance(flag, bool) for flag in flags):
        return Layout(*flags)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if names != {"gate_up_proj", DOWN} or not callable(getattr(module, "act_fn", None)):
        return None
    return REPEATED if len(inspect.signature(type(module).forward).parameters) == 2 else None  # self and one


def first_stack(module: nn.Module) -> str:
    """Return the name of the stack of matrices that read the input."""
    layout = layout_of(module)
    return "gate_up_proj" if layout is not None and layout.has_gate else "up_proj"


def is_stacked(module: nn.Module) -> bool:
    """Return whether a module holds experts in stacked parameters that `ExpertList` can take apart.

    It has a layout, no parameters but the stacks that this announces, and stacks of fitting shapes.
    """
    layout = None if isinstance(module, ExpertList) else layout_of(module)
    if layout is None:
        return False
    activation = "_apply_gate" if layout.has_gate and not layout.repeats else "act_fn"
    if not callable(getattr(module, activation, None)):
        return False
    stacks = {name: tuple(stack.shape) for name, stack in module.named_parameters(recurse=False)}
    first = first_stack(module)
    if stacks.keys() != {first, DOWN} | ({first + BIAS, DOWN + BIAS} if layout.has_bias else set()):
        return False
    if len(stacks[first]) != 3 or len(stacks[DOWN]) != 3:
        return False
    (count, n, h), (read, wide, n_read) = _oriented(stacks[DOWN], layout), _oriented(stacks[first], layout)
    biases = not layout.has_bias or (stacks[first + BIAS] == (count, wide) and stacks[DOWN + BIAS] == (count, n))
    return count == read and n == n_read and wide == h * (2 if layout.has_gate else 1) and biases


def matrices_of(module: nn.Module) -> list[str]:
    """Return the names that the linear layers of all experts of a stacked module get, relative to the module."""
    return [f"{number}.{name}" for number in range(len(getattr(module, DOWN))) for name in (first_stack(module), DOWN)]


class Expert(nn.Module):
    """One expert. Its linear layers have the names of the stacks in which its matrices were."""

    down_proj: nn.Module

    def forward(self, x: Tensor, tokens: Tensor, activation: Activation) -> Tensor:
        """Map the rows x (t, n) of the tokens with indices `tokens` (t,) to (t, n)."""
        output: Tensor = self.down_proj(activation(self.first(x)))
        return output

    @property
    def first(self) -> nn.Module:
        """The layer that reads the input."""
        found: Any = self.gate_up_proj if hasattr(self, "gate_up_proj") else self.up_proj
        return found  # type: ignore[no-any-return]


class ExpertList(nn.Module):
    """Experts with a linear layer for each matrix, in place of a module that stacks them.

    It runs the experts that get tokens one after the other. Activation, norms, attributes and hooks are those of the
    replaced module.

    Args:
        old: module with stacked parameters; see `is_stacked`. The linear layers share their memory.

    Attributes:
        origin: class of the replaced module.
        stacks: names of its parameters, in order.
        repeats: True if it is called with the tokens once for each expert; see `Layout`.
    """

    origin: type[nn.Module]
    stacks: list[str]
    repeats: bool
    post_expert_norm: nn.Module
    _stacks: Stacks | None = None

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        _take_over(self, old)
        layout = layout_of(old)
        if layout is None:
            raise TypeError(f"{type(old).__name__} is no module of stacked experts")
        vars(self).update(layout._asdict())
        self.origin, self.stacks = type(old), [name for name, _ in old.named_parameters(recurse=False)]
        for number in range(len(getattr(old, DOWN))):
            expert = Expert()
            for name in (first_stack(old), DOWN):
                expert.add_module(name, _layer_of(old, layout, name, number))
            self.add_module(str(number), expert.train(old.training))

    @property
    def experts(self) -> list[Expert]:
        """The experts, in order."""
        return [part for part in self.children() if isinstance(part, Expert)]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Map the tokens (N, n) to (N, n), given the experts of each token (N, K) and their weights (N, K).

        If this `repeats`, map the tokens of each expert in turn (E N, n) to (E N, n). Rows of zeros are not run, since
        without biases their outputs are zero.

        Indices that are no expert stand for no expert. In training, experts without tokens run on none, so that their
        gradients are zero as in stacked parameters. DDP expects gradients for all parameters.

        In evaluation without gradients, several tokens run with grouped products, unless the config asks for the eager
        implementation or something watches the experts.
        """
        if top_k_index is None or top_k_weights is None:
            top_k_index, top_k_weights = self._by_place(hidden_states)
        given = hidden_states, top_k_index, top_k_weights
        if not self.training and self._implementation != "eager" and not torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                if can_use_operator(self, hidden_states):
                    return forward_by_operator(self, *given)
            elif (stacks := self._stacks_for(hidden_states, top_k_index)) is not None:
                return forward_by_stacks(self, stacks, *given)
        return self.one_by_one(*given)

    def _by_place(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expert (E N, 1) of each row of zeros or of a token, and weights of one."""
        count, rows = len(self.experts), len(hidden_states)
        numbers = torch.arange(count, device=hidden_states.device).repeat_interleave(rows // count)
        chosen = torch.where(hidden_states.detach().ne(0).any(-1), numbers, count)
        return chosen[:, None], hidden_states.new_ones(rows, 1)

    @property
    def _implementation(self) -> str | None:
        """The experts implementation that the config asks for."""
        found: str | None = getattr(getattr(self, "config", None), "_experts_implementation", None)
        return found

    def _stacks_for(self, x: Tensor, chosen: Tensor) -> Stacks | None:
        """Return the stacks of the present weights; None if tokens (N, n) with experts (N, K) run one by one."""
        slower = False
        if x.device.type == "cpu":
            rows, count = int((chosen < len(self.experts)).sum()), len(self.experts)
            slower = not FEW_ROWS < rows <= MOST_ROWS * count
        if len(x) == 0 or slower or torch.is_autocast_enabled(x.device.type) or not is_eager(x):
            return None
        if self._stacks is None or not self._stacks.hold():
            self._stacks = Stacks.of(self.experts)
        return self._stacks if self._stacks is not None and self._stacks.dtype == x.dtype else None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and give the weights memory of their own for training."""
        if mode:
            self.unstack()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights, each with memory of its own, because many formats cannot store parts of a stack."""
        self.unstack()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without stacks."""
        self.unstack()
        return self.__dict__

    def unstack(self) -> None:
        """Give each weight memory of its own, if stacks of grouped products hold it."""
        if self._stacks is not None:
            self._stacks = None
            own_memory(self)

    def one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute `forward` expert by expert."""
        every = self.training and torch.is_grad_enabled()
        numbers, order = top_k_index.T.flatten().sort(stable=True)
        places = torch.arange(len(self.experts) + 1, device=numbers.device)
        stops = torch.searchsorted(numbers, places).tolist()
        weights, output = top_k_weights.T.flatten(), torch.zeros_like(hidden_states)
        for expert, start, stop in zip(self.experts, stops[:-1], stops[1:], strict=True):
            if start == stop and not every:
                continue
            row = order[start:stop]
            token = row % len(hidden_states)
            found = expert(hidden_states[token], token, self.activation)
            if self.has_post_expert_norm:
                found = self.post_expert_norm(found)
            found = found * weights[row, None]
            output.index_add_(0, token, found.to(output.dtype))
        return output

    def activation(self, wide: Tensor) -> Tensor:
        """Return what comes between the matrices of an expert (t, h), given the output of the first."""
        origin: Any = self.origin
        own: Any = self
        if self.repeats:
            gate, up = wide.chunk(2, -1)
            return own.act_fn(gate) * up  # type: ignore[no-any-return]
        inner: Tensor = origin._apply_gate(self, wide) if self.has_gate else own.act_fn(wide)  # noqa: SLF001
        return inner

    @torch.no_grad()
    def stacked(self, old: nn.Module | None = None) -> nn.Module:
        """Return a module of the original class with the present weights.

        Args:
            old: the module that was replaced, which then gets the weights; None to create one.
        """
        new = self.empty() if old is None else old
        for name in self.stacks:
            for number, expert in enumerate(self.experts):
                part, place = self._part(expert, name), getattr(new, name)[number]
                if part.data_ptr() != place.data_ptr():
                    place.copy_(part)
        return new

    def empty(self) -> nn.Module:
        """Return a module of the original class, with parameters without values on the device of the present ones."""
        added = Layout._fields if self.repeats else ("repeats",)
        new = self.origin.__new__(self.origin)
        nn.Module.__init__(new)
        _take_over(new, self, leave_out=("origin", "stacks", "_stacks", *added))
        for name in self.stacks:
            part = self._part(self.experts[0], name)
            values = part.new_empty(len(self.experts), *part.shape)
            new.register_parameter(name, nn.Parameter(values, requires_grad=part.requires_grad))
        return new

    def _part(self, expert: Expert, stack: str) -> Tensor:
        """Return the part of a stack that an expert holds."""
        layer = getattr(expert, stack.removesuffix(BIAS))
        if stack.endswith(BIAS):
            return layer.bias  # type: ignore[no-any-return]
        return layer.weight.T if self.is_transposed else layer.weight  # type: ignore[no-any-return]


def take_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the stacked modules in which layers of these names would be by modules of linear layers, in place."""
    wanted = set(names)
    for name, module in list(model.named_modules()):
        if is_stacked(module) and any(f"{name}.{part}" in wanted for part in matrices_of(module)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ExpertList(module))


def expert_lists(model: nn.Module) -> Iterator[tuple[str, ExpertList]]:
    """Yield the name and module of every list of experts."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertList))


def _take_over(new: nn.Module, old: nn.Module, leave_out: Iterable[str] = ()) -> None:
    """Give a module the attributes, buffers, submodules other than experts, mode and hooks of another one."""
    take_over(new, old, leave_out)
    new._buffers.update(old._buffers)  # noqa: SLF001
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)  # noqa: SLF001
    new._modules.update({name: part for name, part in old._modules.items() if not isinstance(part, Expert)})  # noqa: SLF001


def _layer_of(old: nn.Module, layout: Layout, name: str, number: int) -> nn.Linear:
    """Return a linear layer that shares the memory of one matrix in a stack, and of its bias."""
    stack, biases = getattr(old, name), getattr(old, name + BIAS) if layout.has_bias else None
    W = stack.data[number]
    W = W.T if layout.is_transposed else W
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W, requires_grad=stack.requires_grad)
    if biases is not None:
        layer.bias = nn.Parameter(biases.data[number], requires_grad=biases.requires_grad)
    return layer.train(old.training)


def _oriented(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return the shape (E, outputs, inputs) of a stack."""
    count, rows, columns = shape
    return (count, columns, rows) if layout.is_transposed else shape
