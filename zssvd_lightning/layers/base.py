"""What linear layers become: what all forms have in common, and the plainest of them, two thin layers.

Shapes: W (m, n), up (m, k), down (k, n). Needs nothing but torch and transformers, so that a saved folder can carry it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LOADING_NOTE = "low-rank: inherit zssvd_lightning.LowRankCheckpointMixin, or give the Trainer a ZSSVDCallback, to load"
"""Stands in for a parameter name in checkpoints, so that a load that knows nothing of low-rank layers says it."""


ADAPTER_NOTE = "adapter: "
"""Begins the name of the entry by which saved weights tell of the adapter on a layer."""


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
"""Where `nn.Module` keeps them."""


Dense = nn.Linear | Conv1D
"""The layers that can be compressed."""


class CompressedLinear(nn.Module):
    """A linear layer `y = W x + b` that keeps W in another form.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.

    Attributes:
        kind: what saved configs call the form.
        transposed: whether the layer it replaces stored its weight as (n, m), the way `Conv1D` of transformers does.
        dtype: floating-point type of the layer it stands for, where that is not the type of its parameters.
        trainable: whether that layer's weights require gradients, where no parameter of its own could.
    """

    kind: ClassVar[str]
    dtype: torch.dtype | None = None
    trainable: bool | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False
        self.register_load_state_dict_pre_hook(_drop_note)  # type: ignore[no-untyped-call]

    @classmethod
    def like(cls, old: "Dense | CompressedLinear", **sizes: Any) -> Self:
        """A layer on the meta device for the place of `old`: its type, `requires_grad` and mode.

        Args:
            old: the layer to replace, dense or compressed.
            sizes: what else the form has to know; the rest of `spec`.
        """
        m, n = shape_of(old)
        new = cls(n, m, bias=old.bias is not None, device="meta", dtype=type_of(old), **sizes)  # type: ignore[call-arg]
        new.transposed = old.transposed if isinstance(old, CompressedLinear) else isinstance(old, Conv1D)
        take_after(new, old)
        return new

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """The sizes `like` needs, when `weights` hold a layer of this form under `name`; else None."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """Kind and sizes, as saved configs tell them."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight (m, n) it stands for, computed at each access: for code that asks for it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shape and sizes, as `print(model)` shows them."""
        told = {"in_features": self.in_features, "out_features": self.out_features} | self.spec
        return ", ".join(f"{key}={value}" for key, value in told.items() if key != "kind")


def shape_of(layer: Dense | CompressedLinear) -> tuple[int, int]:
    """(m, n): outputs, inputs."""
    if isinstance(layer, Conv1D):
        n, m = layer.weight.shape
        return m, n
    return layer.out_features, layer.in_features


def type_of(layer: Dense | CompressedLinear) -> torch.dtype | None:
    """Floating-point type of its weights; None where it has none."""
    if isinstance(layer, CompressedLinear) and layer.dtype is not None:
        return layer.dtype
    return next((parameter.dtype for parameter in layer.parameters()), None)


def take_after(new: nn.Module, old: Dense | CompressedLinear) -> None:
    """Gives `new` the mode of `old`, and to its weights and bias the `requires_grad` of those of `old`."""
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
    """Gives `new` the forward and backward hooks of `old`: the same, so that their handles go on working."""
    new.__dict__.update({kind: old.__dict__[kind] for kind in HOOKS})


def _drop_note(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    for note in (LOADING_NOTE, getattr(module, "adapter", None)):
        state_dict.pop(f"{prefix}{note}", None)  # type: ignore[attr-defined]
