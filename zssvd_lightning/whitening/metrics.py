"""Metrics: the two factors (R, L) of `R^T W L`, each built from second moments; one entry of `METRICS` each."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.whitening.cholesky import FIRST_JITTER, Root, safe_cholesky
from zssvd_lightning.whitening.moments import Moments

ASVD_POWER = 0.5
"""Of the size of an input, by which ASVD scales its column."""


Side = Callable[[Moments, str], Root]


@dataclass(frozen=True)
class Metric:
    """What a layer's weight is multiplied by before its SVD; layers that read one input share its side."""

    inputs: Side
    outputs: Side
    needs_outputs: bool = False
    """Whether it goes by gradients at outputs, which calibration then watches too."""


def identity(moments: Moments, name: str) -> Root:
    """No change of coordinates."""
    return Root()


def input_root(moments: Moments, name: str) -> Root:
    """Of the input second moment: the error of a truncation is the output's."""
    return Root(*safe_cholesky(moments.second_moment(name), name))


def damped_input_root(moments: Moments, name: str) -> Root:
    """The same of a moment whose small directions count for a little more, since few tokens tell of them."""
    return Root(*safe_cholesky(moments.second_moment(name), name, INPUT_DAMPING))


def damped_output_root(moments: Moments, name: str) -> Root:
    """Of the second moment of the gradients at the output."""
    return Root(*safe_cholesky(moments.output_moment(name), name, OUTPUT_DAMPING, "output gradient"))


def input_scale(moments: Moments, name: str) -> Root:
    """Of each input alone: the square root of its root mean square."""
    squares = _floored(moments.second_moment(name).diagonal())
    return Root(squares.pow(ASVD_POWER / 2))


def output_scale(moments: Moments, name: str) -> Root:
    """Of each output alone: the root of the Fisher information of its row, up to a factor."""
    return Root(_floored(moments.output_moment(name).diagonal()).sqrt())


INPUT_DAMPING = 1e-4
"""Relative to the mean of A's diagonal."""


OUTPUT_DAMPING = 1e-2
"""Relative to the mean of B's diagonal."""


METRICS = {
    "none": Metric(identity, identity),
    "rows": Metric(identity, output_scale, needs_outputs=True),
    "diagonal": Metric(input_scale, identity),
    "input": Metric(input_root, identity),
    "two_sided": Metric(damped_input_root, damped_output_root, needs_outputs=True),
}
"""By name.

| name      | multiplies by                                                                                            |
|-----------|----------------------------------------------------------------------------------------------------------|
| none      | nothing: plain SVD                                                                                       |
| rows      | the Fisher information of each row, `sum_j E[d_i^2 x_j^2]`, with d and x as if independent (FWSVD,       |
|           | arXiv 2207.00112)                                                                                        |
| diagonal  | the root mean square of each input to the power 1/2 (ASVD, arXiv 2312.05821)                             |
| input     | A (SVD-LLM, arXiv 2403.07378; ZS-SVD, arXiv 2602.02848)                                                  |
| two_sided | A and B: half of a squared singular value is then a second-order estimate of what it costs to drop it    |
|           | (K-FAC, arXiv 1503.05671; IO-SVD, arXiv 2605.15626)                                                      |
"""


def _floored(squares: Tensor) -> Tensor:
    """Mean squares (n,), none so small that a division by it would blow up noise."""
    return in_float64(squares).clamp_min(float(squares.mean()) * FIRST_JITTER)
