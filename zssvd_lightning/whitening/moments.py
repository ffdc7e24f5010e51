"""What calibration leaves behind: second moments of inputs and of gradients by outputs, and mean gradients.

Shapes: W and G are (m, n), the second moments A (n, n) and B (m, m), tokens are the rows of X (T, n), and of D (T, m)
the gradients of the loss, summed over its terms, by the output at each token.
Sums are kept, in float32 or wider, so that batches of any length and any number of processes add up exactly.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated, add_square
from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError


def not_shared_alike(name: str, leader: str, other: str) -> CalibrationError:
    """The error that layers share an input on one process and not on another."""
    return CalibrationError(
        f"{name} reads the same input as {leader} on one process, but as {other} on another; compress them in separate "
        f"runs, or add {name} to ignore"
    )


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
    output_sums: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> `D^T D` (m, m); empty where gradients by outputs are not watched."""
    output_terms: float = 0.0
    """How many loss terms those are of; as many as the gradients, where 0."""
    loss_sum: float = 0.0
    """Loss summed over its terms."""
    loss_terms: float = 0.0
    """How many terms (predicted tokens) the loss was averaged over."""
    batches: int = 0
    """How many batches gave a loss on each process."""
    with_gradient: list[str] = field(default_factory=list)
    """Layers that have a gradient on some process, once that is known."""
    with_outputs: list[str] = field(default_factory=list)
    """Layers whose gradient by the output was seen on some process, once that is known."""
    component_sums: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> sum over tokens of the squared derivative of the loss by each component (r,), where that is watched."""
    output_side: str | None = None
    """Which gradients by outputs these are, by its name in `output_sides`, where that is known."""

    @torch.no_grad()
    def add_inputs(self, leader: str, X: Tensor) -> None:
        """Adds rows X (T, n), already freed of padding."""
        if leader not in self.input_sums:
            n = X.shape[1]
            self.input_sums[leader] = torch.zeros(n, n, dtype=accumulated(X.dtype), device=X.device)
            self.tokens[leader] = 0
        add_square(self.input_sums[leader], X.detach())
        self.tokens[leader] += X.shape[0]

    @torch.no_grad()
    def add_outputs(self, name: str, D: Tensor, weight: float = 1.0) -> None:
        """Adds `weight` times rows D (T, m), already freed of padding."""
        if name not in self.output_sums:
            m = D.shape[1]
            self.output_sums[name] = torch.zeros(m, m, dtype=accumulated(D.dtype), device=D.device)
        add_square(self.output_sums[name], D.detach(), weight**2)

    @torch.no_grad()
    def add_components(self, name: str, squares: Tensor) -> None:
        """Adds squared derivatives (r,)."""
        self.component_sums[name] = self.component_sums[name] + squares if name in self.component_sums else squares

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor, weight: float = 1.0) -> None:
        """Adds `weight` times the gradient (m, n) of a mean over `weight` loss terms."""
        if name not in self.gradient_sums:
            self.gradient_sums[name] = torch.zeros_like(gradient, dtype=accumulated(gradient.dtype))
        self.gradient_sums[name].add_(gradient, alpha=weight)

    def add_loss(self, mean_loss: float, terms: float) -> None:
        """Adds a batch's loss, a mean over `terms` terms."""
        self.loss_sum += mean_loss * terms
        self.loss_terms += terms
        self.batches += 1

    @torch.no_grad()
    def absorb_moments(self, window: "Moments") -> None:
        """Adds the second moments of another object of the same layers, and empties it."""
        self.leaders |= window.leaders
        for leader, sums in window.input_sums.items():
            if leader in self.input_sums:
                self.input_sums[leader] += sums
                self.tokens[leader] += window.tokens[leader]
            else:
                self.input_sums[leader], self.tokens[leader] = sums, window.tokens[leader]
        for name, sums in window.output_sums.items():
            self.output_sums[name] = self.output_sums[name] + sums if name in self.output_sums else sums
        for name, squares in window.component_sums.items():
            self.add_components(name, squares)
        self.output_terms += window.output_terms
        window.input_sums, window.tokens, window.output_sums, window.component_sums = {}, {}, {}, {}

    def second_moments(self, *, counted: bool = True) -> "Moments":
        """The second moments alone; the tensors are these, not copies.

        Args:
            counted: whether with their counts, or as one more part of a sum whose counts another has.
        """
        tokens = self.tokens if counted else dict.fromkeys(self.tokens, 0)
        terms = (self.output_terms or self.loss_terms) if counted else 0.0
        return Moments(
            dict(self.leaders), dict(self.input_sums), dict(tokens), {}, dict(self.output_sums), output_terms=terms
        )

    def counts(self) -> dict[str, Any]:
        """What is known of the batches seen but for the sums of tensors, as plain types."""
        return {
            "leaders": dict(self.leaders),
            "tokens": dict(self.tokens),
            "with_gradient": [*self.with_gradient, *self.gradient_sums],
            "with_outputs": [*self.with_outputs, *self.output_sums],
            "output_terms": self.output_terms,
            "loss_sum": self.loss_sum,
            "loss_terms": self.loss_terms,
        }

    def take_counts(self, of_all: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the counts of this process by those over all.

        Args:
            of_all: the `counts` of every process.

        Raises:
            CalibrationError: layers share an input on one process and not on another.
        """
        tokens: Counter[str] = Counter()
        for counts in of_all:
            for name, leader in counts["leaders"].items():
                if self.leaders.setdefault(name, leader) != leader:
                    raise not_shared_alike(name, leader, self.leaders[name])
            tokens.update(counts["tokens"])
        self.tokens = dict(tokens)
        self.output_terms = sum(counts["output_terms"] for counts in of_all)
        self.loss_sum = sum(counts["loss_sum"] for counts in of_all)
        self.loss_terms = sum(counts["loss_terms"] for counts in of_all)
        self.with_gradient = list(dict.fromkeys(name for counts in of_all for name in counts["with_gradient"]))
        self.with_outputs = list(dict.fromkeys(name for counts in of_all for name in counts["with_outputs"]))

    def state_dict(self) -> dict[str, Any]:
        """All sums, as plain types and tensors (the tensors are these, not copies)."""
        return {
            f.name: value.copy() if isinstance(value := getattr(self, f.name), (dict, list)) else value
            for f in fields(self)
        }

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
        if not _is_finite_square(A):
            raise NonFiniteError(
                f"the inputs of {name} (width {A.shape[0]}) hold NaN or infinite values; check the calibration data, "
                "or calibrate in float32 or bfloat16"
            )
        return A

    def output_moment(self, name: str) -> Tensor:
        """`B = D^T D / T` (m, m) of the gradients at the output of layer `name`, T being their loss terms.

        With A of the tokens that reach the layer, `A (x) B` is then the curvature of the mean loss (K-FAC, arXiv
        1503.05671), also where not all tokens do.

        Raises:
            ZeroGradientError: no gradient has come to its output.
            NonFiniteError: a gradient was NaN or infinite.
        """
        total = self.output_sums.get(name)
        if total is None or not total.diagonal().any():
            raise ZeroGradientError(
                f"the calibration loss has no gradient at the output of {name}; use a loss that depends on it, or add "
                "it to ignore"
            )
        B = total / (self.output_terms or self.loss_terms)
        if not _is_finite_square(B):
            raise NonFiniteError(
                f"the gradients at the output of {name} (width {B.shape[0]}) are NaN or infinite; lower the loss "
                "scale, or calibrate in float32 or bfloat16"
            )
        return B

    def mean_gradient(self, name: str, over_rows: Callable[[Tensor], Tensor] = lambda number: number) -> Tensor:
        """`G = dL/dW` (m, n), L the mean loss over all terms.

        Args:
            name: the layer.
            over_rows: makes a sum over G of that over its part, where processes hold parts of it.

        Raises:
            ZeroGradientError: the loss does not depend on the layer.
            NonFiniteError: the gradient is NaN or infinite.
        """
        total = self.gradient_sums.get(name)
        size = None if total is None else over_rows(total.abs().sum())
        if total is None or size is None or size == 0:
            raise ZeroGradientError(
                f"the calibration loss has no gradient at {name}, so its components cannot be scored; "
                "use a loss that depends on it, or add it to ignore"
            )
        if not torch.isfinite(size):
            raise NonFiniteError(f"the gradient at {name} is NaN or infinite; lower the loss scale")
        return total / self.loss_terms


def _is_finite_square(A: Tensor) -> bool:
    """Whether all of a second moment is: no entry is larger than the largest on its diagonal (Cauchy-Schwarz)."""
    return bool(A.diagonal().isfinite().all())
