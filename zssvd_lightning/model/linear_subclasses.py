"""Subclasses of linear layers that compute exactly what their base class does, so that they can be replaced alike.

A subclass counts as the same layer if it adds nothing but another way to write the forward pass. Whether it computes
`W x + b` is tried out on a small copy of the layer with random weights. In doubt, the answer is no.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

REDEFINED = {"__init__", "forward", "reset_parameters", "extra_repr"}
"""Methods that a subclass may define anew."""


DESCRIPTIVE = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__firstlineno__",
    "__static_attributes__",
}
"""Entries that Python adds to every class."""


PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Types of attributes that a layer may have besides its parameters."""


SMALL = {"in_features": 5, "out_features": 3, "nx": 5, "nf": 3}
"""Sizes of the copy, under the names of `nn.Linear` and of transformers' `Conv1D`."""


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a layer is an `nn.Linear` or `Conv1D`, or of a subclass that computes the same and adds nothing.

    Subclasses are refused if they have other parameters, buffers, submodules, attributes or methods, or if a copy gives
    another output or other gradients than the base class, in training or in evaluation mode.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    base = next((kind for kind in (nn.Linear, Conv1D) if isinstance(module, kind)), None)
    if base is None or isinstance(module, NonDynamicallyQuantizableLinear):  # whose owner reads its weight directly
        return False
    return _adds_nothing(module, base) and _computes_the_same(module, base)


def _adds_nothing(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether class and object have only what the base class has."""
    mro = type(module).__mro__
    added = {name for kind in mro[: mro.index(base)] for name in vars(kind)} - REDEFINED - DESCRIPTIVE
    own = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
    return (
        not added
        and not module._buffers  # noqa: SLF001  (named_buffers skips empty entries)
        and not module._modules  # noqa: SLF001
        and set(module._parameters) == {"weight", "bias"}  # noqa: SLF001
        and all(_is_plain_parameter(parameter) for parameter in module.parameters())
        and all(isinstance(value, PLAIN) for value in own.values())
    )


def _is_plain_parameter(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter or isinstance(parameter, DTensor)


def _computes_the_same(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether a small copy of the layer has the outputs and gradients of the base class."""
    try:
        with torch.random.fork_rng([]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return all(
                torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
                for training in (True, False)
                for shape in ((4,), (2, 3))
                for found, wanted in _compared(module, base, shape, training=training)
            )
    except Exception:  # noqa: BLE001  (code of others, which may need anything)
        return False


def _compared(
    module: nn.Module, base: type[nn.Module], shape: tuple[int, ...], *, training: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return output and gradients of a small copy of the layer, paired with those of the base class."""
    g = torch.Generator().manual_seed(0)
    n, m = SMALL["in_features"], SMALL["out_features"]
    weight = torch.randn((n, m) if base is Conv1D else (m, n), generator=g)
    bias = None if module.bias is None else torch.randn(m, generator=g)
    x, D = torch.randn(*shape, n, generator=g), torch.randn(*shape, m, generator=g)
    results = []
    for forward in (type(module).forward, base.forward):
        small = _small_copy(module, weight, bias).train(training)
        inputs = x.clone().requires_grad_()
        output: Any = forward(small, inputs)
        sources = [inputs, *small.parameters()]
        results.append([output, *torch.autograd.grad(output, sources, D)])
    return list(zip(*results, strict=True))


def _small_copy(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer of the same class and settings with other weights and without hooks."""
    small = copy(module)
    vars(small).update(vars(nn.Module()))
    vars(small).update({name: size for name, size in SMALL.items() if name in vars(small)})
    small.weight = nn.Parameter(weight.clone())
    small.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
    return small
