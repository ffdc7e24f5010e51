"""What calibration leaves behind: second moments of inputs, and mean gradients.

Shapes: W and G are (m, n), the second moment A is (n, n), tokens are the rows of X (T, n).
Sums are kept, in float32 or wider, so that batches of any length and any number of processes add up exactly.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError


@contextmanager
def exact_products() -> Iterator[None]:
    """Keeps float32 products in float32, whatever `torch.set_float32_matmul_precision` allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Moments:
    """Sums over the calibration tokens.

    Layers that read the same input tensor share one second moment, kept under the name of the first of them, their
    leader.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    """Layer name -> name of the layer that keeps the second moment for it."""
    input_sums: dict[str, Tensor] = field(default_factory=dict)
    """Leader -> `X^T X` (n, n)."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Leader -> T, rows of X that were added."""
    gradient_sums: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> gradient of the loss summed over its terms (m, n)."""
    loss_sum: float = 0.0
    """Loss summed over its terms."""
    loss_terms: float = 0.0
    """How many terms (predicted tokens) the loss was averaged over."""
    batches: int = 0
    """How many batches gave a loss."""

    @torch.no_grad()
    def add_inputs(self, leader: str, X: Tensor) -> None:
        """Adds rows X (T, n), already freed of padding."""
        X = X.detach().to(torch.promote_types(X.dtype, torch.float32))
        if leader not in self.input_sums:
            n = X.shape[1]
            self.input_sums[leader] = torch.zeros(n, n, dtype=X.dtype, device=X.device)
            self.tokens[leader] = 0
        self.input_sums[leader].addmm_(X.T, X)
        self.tokens[leader] += X.shape[0]

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor, weight: float = 1.0) -> None:
        """Adds `weight` times the gradient (m, n) of a mean over `weight` loss terms."""
        if name not in self.gradient_sums:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self.gradient_sums[name] = torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)
        self.gradient_sums[name].add_(gradient, alpha=weight)

    def add_loss(self, mean_loss: float, terms: float) -> None:
        """Adds a batch's loss, a mean over `terms` terms. Raises CalibrationError when there are none."""
        if not terms > 0:
            raise CalibrationError(f"a calibration batch counts {terms} loss terms, but needs some; drop such batches")
        self.loss_sum += mean_loss * terms
        self.loss_terms += terms
        self.batches += 1

    @torch.no_grad()
    def absorb_inputs(self, window: "Moments") -> None:
        """Adds the second moments of another object of the same layers, and empties it."""
        self.leaders |= window.leaders
        for leader, sums in window.input_sums.items():
            if leader in self.input_sums:
                self.input_sums[leader] += sums
                self.tokens[leader] += window.tokens[leader]
            else:
                self.input_sums[leader], self.tokens[leader] = sums, window.tokens[leader]
        window.input_sums, window.tokens = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """All sums, as plain types and tensors (the tensors are these, not copies)."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), dict) else value for f in fields(self)
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device_of: Callable[[str], torch.device]) -> "Moments":
        """The statistics of a `state_dict`, each layer's as a copy on the device that `device_of` names for it."""
        moments = cls(**state)
        for sums in (moments.input_sums, moments.gradient_sums):
            sums.update({name: value.to(device_of(name), copy=True) for name, value in sums.items()})
        return moments

    @property
    def mean_loss(self) -> float:
        """Mean loss over all terms seen."""
        return self.loss_sum / self.loss_terms

    def second_moment(self, name: str) -> Tensor:
        """`A = X^T X / T` (n, n) of the input of layer `name`.

        Raises:
            CalibrationError: the layer never ran.
            NonFiniteError: an activation was NaN or infinite.
        """
        leader = self.leaders.get(name)
        if leader is None or not self.tokens.get(leader):
            raise CalibrationError(
                f"{name} never ran during calibration, so nothing is known of its inputs; "
                "calibrate on batches that reach it, or add it to ignore"
            )
        A = self.input_sums[leader] / self.tokens[leader]
        if not torch.isfinite(A).all():
            raise NonFiniteError(
                f"the inputs of {name} (width {A.shape[0]}) hold NaN or infinite values; check the calibration data, "
                "or calibrate in float32 or bfloat16"
            )
        return A

    def mean_gradient(self, name: str) -> Tensor:
        """`G = dL/dW` (m, n), L the mean loss over all terms.

        Raises:
            ZeroGradientError: the loss does not depend on the layer.
            NonFiniteError: the gradient is NaN or infinite.
        """
        if name not in self.gradient_sums or not self.gradient_sums[name].any():
            raise ZeroGradientError(
                f"the calibration loss has no gradient at {name}, so its components cannot be scored; "
                "use a loss that depends on it, or add it to ignore"
            )
        G = self.gradient_sums[name] / self.loss_terms
        if not torch.isfinite(G).all():
            raise NonFiniteError(f"the gradient at {name} {tuple(G.shape)} is NaN or infinite; lower the loss scale")
        return G
