"""Stacked experts of a model that are separate linear layers during a compression.

The modules are recognized by their structure, and the replacement is proved: both must give the same outputs.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._numerics import exact_products
from zssvd_lightning.layers.base import HOOKS, CompressedLinear
from zssvd_lightning.layers.experts import DOWN, ExpertList, expert_lists, is_stacked, matrices_of
from zssvd_lightning.model.peft_layers import wraps_by_peft

logger = logging.getLogger(__name__)

Replace = Callable[[nn.Module, nn.Module, nn.Module], None]

SEED = 0


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that stack the matrices of experts, by qualified name in module order."""
    return {name: module for name, module in model.named_modules() if is_stacked(module)}


def stacked_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module that stacks each matrix of an expert, by the name of the matrix as a linear layer."""
    return {f"{name}.{part}": module for name, module in stacked_experts(model).items() for part in matrices_of(module)}


class SeparateExperts:
    """Linear layers that replace stacked experts, with the same memory, until they are put back.

    Args:
        model: any module.
        selected: function that returns whether a layer of this name is to be compressed. Modules without such a layer
            are left alone.
        replace: function that replaces a module, `replace(model, old, new)`.

    Attributes:
        modules: the stacked modules with layers to compress, by qualified name.
        left: name -> reason, for those that cannot be taken apart. They stay as they are.
    """

    def __init__(self, model: nn.Module, selected: Callable[[str], bool], replace: Replace) -> None:
        self._model, self._replace = model, replace
        self._lists: dict[str, ExpertList] = {}
        self.modules: dict[str, nn.Module] = {}
        self.left: dict[str, str] = {}
        wrapped = [name for name, module in model.named_modules() if name and wraps_by_peft(module)]
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for name, module in stacked_experts(model).items():
            if not any(selected(f"{name}.{part}") for part in matrices_of(module)):
                continue
            if any(name.startswith(f"{outer}.") for outer in wrapped):
                reason: str | None = "PEFT adapts it; merge the adapter first"
            else:
                reason = _why_not(module, owners)
            if reason is None:
                self.modules[name] = module
            else:
                self.left[name] = reason

    def put_in(self, *, proves: bool = True) -> None:
        """Replace the stacked modules by lists of experts, and log which stay as they are and why.

        Args:
            proves: False for a model without values, where the outputs of both cannot be compared.
        """
        for name, old in self.modules.items():
            new = ExpertList(old)
            if proves and (reason := difference(old, new)) is not None:
                self.left[name] = reason
                continue
            self._lists[name] = new
            self._replace(self._model, old, new)
        for name, reason in self.left.items():
            kind = type(self._model.get_submodule(name)).__name__
            logger.warning("the experts of %s (%s) are not compressed: %s", name, kind, reason)

    def put_back(self, leave: Collection[str] = ()) -> None:
        """Put the stacked modules back, with the present weights, where no layer of the experts is compressed.

        Args:
            leave: names of layers that will be compressed later, whose experts stay separate.
        """
        present = {id(module) for module in self._model.modules()} if self._lists else set()
        for name, experts in self._lists.items():
            if id(experts) not in present:
                continue
            later = any(f"{name}.{part}" in leave for part in matrices_of(self.modules[name]))
            if later or any(isinstance(part, CompressedLinear) for part in experts.modules()):
                experts.own_memory()
            else:
                old = experts.stacked(self.modules[name])
                old.train(experts.training)
                self._replace(self._model, experts, old)

    def write_stacked(self, weights: dict[str, Any]) -> None:
        """In a state dict of the model, replace the entries of lists of experts by those of the stacked modules."""
        names = {id(experts): name for name, experts in self._lists.items()}
        for place, module in self._model.named_modules(remove_duplicate=False):
            if id(module) in names and isinstance(module, ExpertList):
                for key in module.state_dict():
                    weights.pop(f"{place}.{key}", None)
                old = module.stacked(self.modules[names[id(module)]])
                weights.update({f"{place}.{key}": value for key, value in old.state_dict().items()})


def match_experts(model: nn.Module, weights: Mapping[str, Any], replace: Replace) -> Callable[[], None]:
    """Take experts apart or stack them, as the names of saved weights are, and return a function that undoes it.

    Modules that are stacked for this get no values.

    Args:
        model: the module that will load the weights.
        weights: the state dict to load.
        replace: function that replaces a module, `replace(model, old, new)`.
    """
    done: list[tuple[nn.Module, nn.Module]] = []
    for name, module in stacked_experts(model).items():
        if any(key.startswith(f"{name}.{part}.") for part in matrices_of(module)[:2] for key in weights):
            done.append((module, ExpertList(module)))
    for name, experts in expert_lists(model):
        if f"{name}.{experts.stacks[0]}" in weights:
            done.append((experts, experts.empty()))
    for old, new in done:
        replace(model, old, new)

    def undo() -> None:
        for old, new in done:
            replace(model, new, old)

    return undo


@torch.no_grad()
def difference(old: nn.Module, new: ExpertList) -> str | None:
    """Return how the outputs of a list of experts differ from those of the module it replaces; None if they do not.

    Both run on random tokens, of which each expert gets two, without their hooks. The outputs must be equal up to the
    square root of the precision of their type, relative to the largest one.

    Args:
        old: the module with stacked parameters.
        new: the list of experts.
    """
    weight: Tensor = getattr(new.experts[0], DOWN).weight
    count, n = len(new.experts), len(weight)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randn(count, n, generator=generator).to(weight)
    experts = torch.stack([torch.arange(count), torch.arange(1, count + 1) % count], 1)[:, : min(2, count)]
    shares = torch.rand(experts.shape, generator=generator).add_(0.5).to(weight)
    hooks = {kind: vars(old)[kind] for kind in HOOKS}
    try:
        bare = vars(nn.Module())
        for module in (old, new):
            vars(module).update({kind: bare[kind] for kind in HOOKS})
        with (
            evaluation_mode(old),
            evaluation_mode(new),
            exact_products(),
            torch.autocast(weight.device.type, enabled=False),
        ):
            outputs: Sequence[Tensor] = [
                module(tokens.clone(), experts.to(weight.device), shares) for module in (old, new)
            ]
    except Exception as error:  # noqa: BLE001  modules are of any type
        return f"it does not run on tokens ({count}, {n}) with the experts and weights of each: {error}"
    finally:
        for module in (old, new):
            vars(module).update(hooks)
    expected, found = (output.float() for output in outputs)
    if expected.shape != found.shape:
        return f"it returns {tuple(expected.shape)} for tokens {tuple(found.shape)}"
    rest, size = float((expected - found).abs().max()), float(expected.abs().max())
    if not rest <= torch.finfo(weight.dtype).eps ** 0.5 * size:
        return f"as separate linear layers they give other outputs, by {rest:.3g} of {size:.3g}"
    return None


def _why_not(module: nn.Module, owners: Counter[int]) -> str | None:
    """Return why a stacked module cannot be taken apart, or None if it can be tried."""
    stacks = list(module.parameters(recurse=False))
    if any(isinstance(stack, DTensor) for stack in stacks) or getattr(module, "_is_expert_parallel", False):
        return "its parameters are spread over processes"
    if any(not stack.is_floating_point() or stack.dtype.itemsize < 2 for stack in stacks):
        return f"its parameters are {stacks[0].dtype}, which holds quantized codes"
    if any(owners[id(stack)] > 1 for stack in stacks):
        return "its parameters are tied to those of another module"
    if any(type(stack) is not nn.Parameter for stack in stacks) or torch.nn.utils.parametrize.is_parametrized(module):
        return "its parameters are computed from others"
    return None
