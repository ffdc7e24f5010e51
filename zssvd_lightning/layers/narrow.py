"""Linear layer at a hidden width of which some units are removed.

Shapes: W (m, n) of the replaced layer; (p, q) of what is left of it. Imports only torch, so that a saved folder can
contain a copy of this file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zssvd_lightning.layers.base import CompressedLinear


class NarrowLinear(CompressedLinear):
    """Dense layer with fewer inputs or outputs than the layer it replaces.

    A layer that writes a hidden width has fewer outputs, and the layer that reads it has fewer inputs.

    Args:
        in_features: n, size of the input of the replaced layer.
        out_features: m, size of its output.
        inputs: q, number of inputs that are left.
        outputs: p, number of outputs that are left.
        bias: True for a bias (p,).

    Attributes:
        narrow: `nn.Linear` with weight (p, q).

    Example:
        >>> NarrowLinear(in_features=64, out_features=96, inputs=64, outputs=80)(torch.randn(3, 64)).shape
        torch.Size([3, 80])
    """

    kind = "narrow"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        inputs: int,
        outputs: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (0 < inputs <= in_features and 0 < outputs <= out_features):
            raise ValueError(f"({outputs}, {inputs}) is no part of ({out_features}, {in_features})")
        super().__init__(in_features, out_features)
        self.narrow = nn.Linear(inputs, outputs, bias, device=device, dtype=dtype)

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        weight = weights.get(f"{name}.narrow.weight")
        return None if weight is None else {"inputs": weight.shape[1], "outputs": len(weight)}

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Overwrite the values with a weight (p, q) and, unless None, a bias (p,)."""
        self.narrow.weight.copy_(weight)
        if bias is not None:
            self.narrow.bias.copy_(bias)

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind, "inputs": self.narrow.in_features, "outputs": self.narrow.out_features}

    @property
    def weight(self) -> Tensor:
        """Weight (m, n) with zeros for the units that are gone, which come last.

        With zeros in all layers that meet in a width, the function of the model is the same: the layer that reads it
        ignores the units that are gone, whatever their activations are.
        """
        W = self.narrow.weight
        return pad(W, (0, self.in_features - W.shape[1], 0, self.out_features - W.shape[0]))

    @property
    def bias(self) -> Tensor | None:
        """Bias (m,) with zeros for the units that are gone, or None."""
        bias: Tensor | None = self.narrow.bias
        return None if bias is None else pad(bias, (0, self.out_features - len(bias)))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., q) to (..., p)."""
        output: Tensor = self.narrow(x)
        return output
