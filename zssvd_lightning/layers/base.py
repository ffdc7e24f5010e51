"""Base class of all compressed linear layers, and helpers that replace one layer by another.

Shapes: W (m, n). Imports only torch and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NOTE = "low-rank: "
"""Prefix of the entry name in checkpoints by which a load without support for low-rank layers is told what it needs."""


LOADING_NOTE = (
    f"{NOTE}use zssvd_lightning.load_from_checkpoint(MyModule, path), inherit zssvd_lightning.LowRankCheckpointMixin, "
    "or give the Trainer a ZSSVDCallback, to load"
)
"""Entry name in checkpoints. It ends the error of a load that does not support low-rank layers."""


ADAPTER_NOTE = "adapter: "
"""Prefix of the entry name that describes the adapter of a layer in saved weights."""


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Attributes in which `nn.Module` stores its hooks."""


Dense = nn.Linear | Conv1D
"""Layer types that can be compressed."""


class CompressedLinear(nn.Module):
    """Linear layer `y = W x + b` that stores W in another form.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.

    Attributes:
        kind: name of the form in saved configs.
        permutations: names of the buffers that hold a permutation of their own indices.
        transposed: True if the replaced layer stored its weight as (n, m), as transformers' `Conv1D` does.
        dtype: floating-point type of the replaced layer. None if it is the type of the parameters.
        trainable: True if the weights of the replaced layer require gradients. None if the parameters show this.
    """

    kind: ClassVar[str]
    permutations: ClassVar[tuple[str, ...]] = ()
    dtype: torch.dtype | None = None
    trainable: bool | None = None
    __jit_unused_properties__: ClassVar[list[str]] = ["spec", "weight", "rank", "bias"]
    """Properties that `torch.jit.script` leaves out; `forward` does not use them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False
        self.register_load_state_dict_pre_hook(_drop_note)  # type: ignore[no-untyped-call]

    @classmethod
    def like(cls, old: "Dense | CompressedLinear", **sizes: Any) -> Self:
        """Create a layer on the meta device to replace `old`, with its type, `requires_grad` and training mode.

        Args:
            old: layer to replace, dense or compressed.
            sizes: further sizes that the form needs: the entries of `spec` other than `kind`.
        """
        m, n = shape_of(old)
        new = cls(n, m, bias=old.bias is not None, device="meta", dtype=type_of(old), **sizes)  # type: ignore[call-arg]
        new.transposed = old.transposed if isinstance(old, CompressedLinear) else isinstance(old, Conv1D)
        take_after(new, old)
        return new

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """Return the sizes for `like` if `weights` contain a layer of this form under `name`, else None."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """Kind and sizes, as stored in saved configs."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Equivalent dense weight (m, n), computed at each access. For code that reads `layer.weight`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialize the factors as torch does dense layers. Some models call this on their layers when they load."""
        for part in self.children():
            if isinstance(part, nn.Linear):
                part.reset_parameters()

    def fault(self) -> str | None:
        """Return what no values of this form can be, or None if there is no such fault. Offloaded values are skipped.

        Floating-point values must be finite, and `permutations` must contain each index once.
        """
        for name, value in self.state_dict().items():
            if value.is_meta or not value.numel():
                continue
            if value.is_floating_point() and not is_finite(value):
                return f"{name} has values that are NaN or infinite"
            if name in self.permutations and not torch.equal(
                value.long().sort().values, torch.arange(len(value), device=value.device)
            ):
                return f"{name} is no permutation of 0 to {len(value) - 1}"
        return None

    def extra_repr(self) -> str:
        """Return the shape and sizes for `print(model)`."""
        told = {"in_features": self.in_features, "out_features": self.out_features} | self.spec
        return ", ".join(f"{key}={value}" for key, value in told.items() if key != "kind")


class FactoredLinear(CompressedLinear):
    """Compressed layer that applies two thin linear layers in a row. Their weights can be trained, or carry an adapter.

    Attributes:
        thin: names of the thin layers by the factor that they stand for: `down` reads the input, `up` comes after it.
        adapter: note in saved weights that describes the peft adapter on the thin layers, or None without an adapter.
        flags: `requires_grad` of the weights and of the bias before the adapter was attached.
    """

    thin: ClassVar[Mapping[str, str]]
    adapter: str | None = None
    flags: tuple[bool, bool] = (True, True)

    def thin_layers(self, factors: Sequence[str] = ("down", "up")) -> dict[str, nn.Module]:
        """Return the thin layers that stand for these factors, by name, with their adapters; skip those not needed."""
        found = {name: getattr(self, name) for factor, name in self.thin.items() if factor in factors}
        return {name: layer for name, layer in found.items() if layer is not None}


def shape_of(layer: Dense | CompressedLinear) -> tuple[int, int]:
    """Return (m, n): outputs, inputs."""
    if isinstance(layer, Conv1D):
        n, m = layer.weight.shape
        return m, n
    return layer.out_features, layer.in_features


def type_of(layer: Dense | CompressedLinear) -> torch.dtype | None:
    """Return the floating-point type of the weights, or None if there are no parameters."""
    if isinstance(layer, CompressedLinear) and layer.dtype is not None:
        return layer.dtype
    return next((parameter.dtype for parameter in layer.parameters()), None)


def is_finite(values: Tensor) -> bool:
    """Return True if `values` are of a floating-point type and finite. Needs no memory of their size."""
    if not values.is_floating_point():
        return False
    return not values.numel() or bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def take_after(new: nn.Module, old: Dense | CompressedLinear) -> None:
    """Copy the training mode of `old`, and the `requires_grad` of its weights and bias, to `new`."""
    new.train(old.training)
    weights = [p.requires_grad for n, p in old.named_parameters() if not n.endswith("bias")]
    if isinstance(old, CompressedLinear) and old.trainable is not None:
        weights = [old.trainable]
    if isinstance(new, CompressedLinear) and new.trainable is not None:
        new.trainable = weights[0]
    for name, parameter in new.named_parameters():
        if name.endswith("bias") and old.bias is not None:
            parameter.requires_grad_(bool(old.bias.requires_grad))
        elif weights:
            parameter.requires_grad_(weights[0])


def carry_hooks(new: nn.Module, old: nn.Module) -> None:
    """Share the forward and backward hooks of `old` with `new`. They are not copied, so their handles still work."""
    new.__dict__.update({kind: old.__dict__[kind] for kind in HOOKS})


def take_over(new: nn.Module, old: nn.Module, leave_out: Iterable[str] = ()) -> None:
    """Give a module the settings, mode and hooks of another one."""
    own = vars(nn.Module()).keys() | set(leave_out)
    new.__dict__.update({name: value for name, value in vars(old).items() if name not in own})
    new.training = old.training
    carry_hooks(new, old)


def own_memory(module: nn.Module) -> None:
    """Copy the parameters of a module that are parts of larger tensors, so that they do not keep these in memory."""
    for parameter in module.parameters():
        whole = type(parameter.data) is Tensor
        if whole and (parameter.untyped_storage().nbytes() > parameter.nbytes or not parameter.is_contiguous()):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _drop_note(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Remove the notes on a layer. The loading note of an earlier release has other words."""
    adapter = f"{prefix}{getattr(module, 'adapter', None)}"
    for key in [key for key in state_dict if key == adapter or key.startswith(f"{prefix}{NOTE}")]:
        del state_dict[key]
