"""Calibration statistics: second moments of inputs and of output gradients, and mean gradients.

Shapes: W and G are (m, n); the second moments are A (n, n) and B (m, m). Each row of X (T, n) is the input at one
token. Each row of D (T, m) is the gradient of the loss, summed over its terms, with respect to the output at one token.
`Moments` stores sums in float32 or wider, so that batches of any length and any number of processes add up exactly.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated, add_square
from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError


def not_shared_alike(name: str, leader: str, other: str) -> CalibrationError:
    """Return the error for layers that share an input on one process but not on another."""
    return CalibrationError(
        f"{name} reads the same input as {leader} on one process, but as {other} on another; compress them in separate "
        f"runs, or add {name} to ignore"
    )


@dataclass
class Moments:
    """Sums over the calibration tokens.

    Layers that read the same input tensor share one second moment. It is stored under the name of the first of these
    layers, their leader.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    """Layer -> its leader, under whose name the input second moment is stored."""
    input_sums: MutableMapping[str, Tensor] = field(default_factory=dict)
    """Leader -> `X^T X` (n, n)."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Leader -> T, the number of rows of X added."""
    gradient_sums: MutableMapping[str, Tensor] = field(default_factory=dict)
    """Layer -> gradient (m, n) of the loss summed over its terms."""
    output_sums: MutableMapping[str, Tensor] = field(default_factory=dict)
    """Layer -> `D^T D` (m, m). Empty if output gradients are not collected."""
    output_terms: float = 0.0
    """Number of loss terms in `output_sums`. 0 means the same number as `loss_terms`."""
    loss_sum: float = 0.0
    """Sum of the loss over its terms."""
    loss_terms: float = 0.0
    """Number of loss terms (predicted tokens) in `loss_sum`."""
    batches: int = 0
    """Number of batches with a loss on each process."""
    with_gradient: list[str] = field(default_factory=list)
    """Layers with a gradient on at least one process. Filled by `take_counts`."""
    with_outputs: list[str] = field(default_factory=list)
    """Layers with an output gradient on at least one process. Filled by `take_counts`."""
    component_sums: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> sum over tokens of the squared derivative of the loss by each component (r,), if collected."""
    removal_sums: dict[str, Tensor] = field(default_factory=dict)
    """List of experts -> sums over tokens of the change of the loss by removing each expert, and of its square (2, E),
    if collected."""
    output_side: str | None = None
    """Source of the output gradients: a key of `output_gradients.OUTPUT_GRADIENTS`, or None if unknown."""
    widths: list[Any] = field(default_factory=list)
    """Hidden widths whose order was tried: the `state_dict` of `calibration.widths.free_widths.FreeWidths`."""
    narrower: bool = False
    """True if only widths that can have fewer units count as free."""
    watched: list[str] = field(default_factory=list)
    """Layers that the statistics were to be gathered of, including those that never ran. Empty if unknown."""

    @torch.no_grad()
    def add_inputs(self, leader: str, X: Tensor) -> None:
        """Add the rows X (T, n), without padding."""
        if leader not in self.input_sums:
            n = X.shape[1]
            self.input_sums[leader] = torch.zeros(n, n, dtype=accumulated(X.dtype), device=X.device)
            self.tokens[leader] = 0
        total = self.input_sums[leader]
        add_square(total, X.detach())
        self.input_sums[leader] = total  # mappings elsewhere than in memory return copies
        self.tokens[leader] += X.shape[0]

    def part(self, name: str, total: Tensor, tokens: int) -> None:
        """Have a layer be its own leader from now on, with a copy of sums that were those of another leader so far."""
        self.leaders[name], self.input_sums[name], self.tokens[name] = name, total.clone(), tokens

    @torch.no_grad()
    def add_outputs(self, name: str, D: Tensor, weight: float = 1.0) -> None:
        """Add the rows `weight * D` (T, m), without padding."""
        if name not in self.output_sums:
            m = D.shape[1]
            self.output_sums[name] = torch.zeros(m, m, dtype=accumulated(D.dtype), device=D.device)
        total = self.output_sums[name]
        add_square(total, D.detach(), weight**2)
        self.output_sums[name] = total

    @torch.no_grad()
    def add_components(self, name: str, squares: Tensor) -> None:
        """Add squared derivatives (r,) of the loss with respect to the components of a layer."""
        self.component_sums[name] = self.component_sums[name] + squares if name in self.component_sums else squares

    @torch.no_grad()
    def add_removals(self, name: str, sums: Tensor) -> None:
        """Add changes of the loss, and their squares (2, E), from removing each expert of a list."""
        self.removal_sums[name] = self.removal_sums[name] + sums if name in self.removal_sums else sums

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor, weight: float = 1.0) -> None:
        """Add `weight` times the gradient (m, n) of a mean over `weight` loss terms."""
        if name not in self.gradient_sums:
            self.gradient_sums[name] = torch.zeros_like(gradient, dtype=accumulated(gradient.dtype))
        self.gradient_sums[name] = self.gradient_sums[name].add_(gradient, alpha=weight)

    def add_loss(self, mean_loss: float, terms: float) -> None:
        """Add the loss of a batch, a mean over `terms` terms."""
        self.loss_sum += mean_loss * terms
        self.loss_terms += terms
        self.batches += 1

    @torch.no_grad()
    def absorb_moments(self, window: "Moments") -> None:
        """Add the second moments of `window`, which covers the same layers, and empty it."""
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
        for name, sums in window.removal_sums.items():
            self.add_removals(name, sums)
        self.output_terms += window.output_terms
        for sums_of_window in (window.input_sums, window.output_sums, window.component_sums, window.removal_sums):
            sums_of_window.clear()
        window.tokens = {}

    def leave_out(self, names: Collection[str]) -> None:
        """Drop the statistics of layers; call it after `take_counts`.

        A second moment that other layers share is stored under the name of one of these.
        """
        remaining = {name: leader for name, leader in self.leaders.items() if name not in names}
        new = {leader: min(n for n, other in remaining.items() if other == leader) for leader in remaining.values()}
        new |= {leader: leader for leader in new if leader not in names}
        self.leaders = {name: new[leader] for name, leader in remaining.items()}
        for leader in [leader for leader in self.input_sums if new.get(leader) != leader]:
            A = self.input_sums.pop(leader)
            if leader in new:
                self.input_sums[new[leader]] = A
        self.tokens = {new[leader]: T for leader, T in self.tokens.items() if leader in new}
        for sums in (self.gradient_sums, self.output_sums, self.component_sums):
            for name in [name for name in names if name in sums]:
                del sums[name]
        self.with_gradient = [name for name in self.with_gradient if name not in names]
        self.with_outputs = [name for name in self.with_outputs if name not in names]

    def second_moments(self, *, counted: bool = True) -> "Moments":
        """Return the second moments alone. The tensors are shared, not copied.

        Args:
            counted: True to include the token and term counts. False sets them to 0, for a partial sum whose counts
                another object holds.
        """
        tokens = self.tokens if counted else dict.fromkeys(self.tokens, 0)
        terms = (self.output_terms or self.loss_terms) if counted else 0.0
        return Moments(
            dict(self.leaders), copy(self.input_sums), dict(tokens), {}, copy(self.output_sums), output_terms=terms
        )

    def with_sums_of(self, name: str, A: Tensor | None, G: Tensor | None, B: Tensor | None) -> "Moments":
        """Return statistics with the same counts and the sums of one layer alone; those that are None are left out.

        Args:
            name: name of the layer.
            A: sum of `X^T X` (n, n) of its inputs.
            G: summed gradient (m, n).
            B: sum of `D^T D` (m, m) of its output gradients.
        """
        counted = Moments(dict(self.leaders), tokens=self.tokens)
        counted.output_terms, counted.loss_terms = self.output_terms, self.loss_terms
        counted.input_sums = {} if A is None else {self.leaders.get(name, name): A}
        counted.gradient_sums = {} if G is None else {name: G}
        counted.output_sums = {} if B is None else {name: B}
        return counted

    def reuse(self, second_moments: "Moments") -> None:
        """Take the second moments of another object, for statistics that have none."""
        self.leaders, self.tokens = second_moments.leaders, second_moments.tokens
        self.input_sums, self.output_sums = second_moments.input_sums, second_moments.output_sums
        self.output_terms += second_moments.output_terms

    def counts(self) -> dict[str, Any]:
        """Return token and term counts, layer names and the loss sum as plain types, without tensors."""
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
        """Replace the counts of this process by the totals over all processes.

        Args:
            of_all: the `counts` of every process.

        Raises:
            CalibrationError: layers share an input on one process but not on another.
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
        """Return all fields as plain types and tensors. The tensors are shared, not copied."""
        return {
            f.name: value.copy() if isinstance(value := getattr(self, f.name), (dict, list)) else value
            for f in fields(self)
        }

    @property
    def mean_loss(self) -> float:
        """Mean loss over all terms."""
        return self.loss_sum / self.loss_terms

    def second_moment(self, name: str) -> Tensor:
        """Return `A = X^T X / T` (n, n) for the input of layer `name`.

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
        """Return `B = D^T D / T` (m, m) for the output gradients of layer `name`. T is the number of loss terms.

        `A (x) B` then approximates the curvature of the mean loss (K-FAC, arXiv 1503.05671). This holds even if only
        some tokens reach the layer, since A averages over the tokens that do.

        Raises:
            ZeroGradientError: no gradient reached the output of the layer.
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
        """Return `G = dL/dW` (m, n), where L is the mean loss over all terms.

        Args:
            name: layer name.
            over_rows: function that turns a sum over this process's part of G into the sum over all of G.

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


def statistics_bytes(
    shape: tuple[int, int], dtype: torch.dtype, *, outputs: bool, parts: int = 1, sets: int = 1
) -> int:
    """Return the bytes of the sums of one layer that shares its input with no other.

    They are those of `X^T X` (n, n), the gradient (m, n) and, with `outputs`, `D^T D` (m, m).

    Args:
        shape: shape (m, n) of the weight.
        dtype: type of weights and inputs.
        outputs: True if output gradients are collected.
        parts: number of processes that each hold rows of the first two. The last is whole on each.
        sets: number of copies of the second moments.
    """
    m, n = shape
    numbers = (sets * n * n + m * n) / parts + (sets * m * m if outputs else 0)
    return math.ceil(numbers) * accumulated(dtype).itemsize


def _is_finite_square(A: Tensor) -> bool:
    """Return whether a second moment is finite. Its diagonal bounds every entry (Cauchy-Schwarz)."""
    return bool(A.diagonal().isfinite().all())
