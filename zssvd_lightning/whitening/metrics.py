"""Metrics: the pairs (R, L) in `R^T W L`, built from second moments and listed in `METRICS`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning._registry import Registry, instance_of
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.whitening.cholesky import FIRST_JITTER, Root, safe_cholesky
from zssvd_lightning.whitening.moments import Moments

ASVD_POWER = 0.5
"""Exponent of an input's root mean square in the scale of its column (ASVD, arXiv 2312.05821)."""


Side = Callable[[Moments, str], Root]
"""Function that builds one side's root from the moments and a layer name."""


@dataclass(frozen=True)
class Metric:
    """Factors applied to both sides of a weight before its SVD."""

    inputs: Side
    """Builder of L. Layers that read the same input share its second moment."""
    outputs: Side
    """Builder of R."""
    needs_outputs: bool = False
    """True if R needs output-gradient second moments, which calibration then collects."""
    measures_loss: bool = False
    """True if half of a squared singular value estimates the loss from dropping the component. Natural steps and
    `reestimate` need this."""
    weighs_rows: bool = False
    """True if `rounding.importance` holds in these coordinates: inputs are white, and outputs are unchanged."""
    of_second_moments: bool = False
    """True if both builders read the second moments alone. Roots are then kept as long as the moments are."""

    def input_root(self, moments: Moments, name: str, n: int) -> Root:
        """Return L for a layer with n inputs.

        Raises:
            CalibrationError: the moments are missing or degenerate.
            ConfigError: the builder returned no valid root. The message names builder and layer.
        """
        return _checked(self.inputs(moments, name), n, self.inputs, name)

    def output_root(self, moments: Moments, name: str, m: int) -> Root:
        """Return R for a layer with m outputs. Errors are those of `input_root`."""
        return _checked(self.outputs(moments, name), m, self.outputs, name)


def identity(moments: Moments, name: str) -> Root:
    """Return the identity root, which changes no coordinates."""
    return Root()


def input_root(moments: Moments, name: str) -> Root:
    """Return the root of the input second moment. The truncation error then equals the output error."""
    return Root(*safe_cholesky(moments.second_moment(name), name))


def damped_input_root(moments: Moments, name: str) -> Root:
    """Return the damped root of the input second moment.

    Damping gives slightly more weight to small directions, which few tokens determine.
    """
    return Root(*safe_cholesky(moments.second_moment(name), name, INPUT_DAMPING))


def damped_output_root(moments: Moments, name: str) -> Root:
    """Return the damped root of the output-gradient second moment."""
    return Root(*safe_cholesky(moments.output_moment(name), name, OUTPUT_DAMPING, "output gradient"))


def input_scale(moments: Moments, name: str) -> Root:
    """Return a diagonal root: the square root of each input's root mean square."""
    squares = _floored(moments.second_moment(name).diagonal())
    return Root(squares.pow(ASVD_POWER / 2))


def output_scale(moments: Moments, name: str) -> Root:
    """Return a diagonal root: the square root of each row's Fisher information, up to a common factor."""
    return Root(_floored(moments.output_moment(name).diagonal()).sqrt())


INPUT_DAMPING = 1e-4
"""Damping of A, relative to the mean of its diagonal."""


OUTPUT_DAMPING = 1e-2
"""Damping of B, relative to the mean of its diagonal."""


ROWS_AT_ONCE = 1024
"""Rows of a root that are checked at once, which bounds the memory of the check."""


METRICS: Registry[Metric] = Registry(
    "metric",
    "zssvd_lightning.metrics",
    {
        "none": Metric(identity, identity),
        "rows": Metric(identity, output_scale, needs_outputs=True),
        "diagonal": Metric(input_scale, identity),
        "input": Metric(input_root, identity, weighs_rows=True, of_second_moments=True),
        "two_sided": Metric(
            damped_input_root, damped_output_root, needs_outputs=True, measures_loss=True, of_second_moments=True
        ),
    },
    instance_of(Metric, "inputs", "outputs"),
)
"""Metrics by name; `register` adds one.

| name      | weighting                                                                                                |
|-----------|----------------------------------------------------------------------------------------------------------|
| none      | nothing: plain SVD                                                                                       |
| rows      | Fisher information of each row, `sum_j E[d_i^2 x_j^2]`, treating d and x as independent (FWSVD,          |
|           | arXiv 2207.00112)                                                                                        |
| diagonal  | root mean square of each input to the power 1/2 (ASVD, arXiv 2312.05821)                                 |
| input     | A (SVD-LLM, arXiv 2403.07378; ZS-SVD, arXiv 2602.02848)                                                  |
| two_sided | A and B: half of a squared singular value is then a second-order estimate of the loss increase from      |
|           | dropping that component (K-FAC, arXiv 1503.05671; IO-SVD, arXiv 2605.15626)                              |
"""


def _floored(squares: Tensor) -> Tensor:
    """Return mean squares (n,) in float64, clamped from below so that dividing by them does not amplify noise."""
    return in_float64(squares).clamp_min(float(squares.mean()) * FIRST_JITTER)


def _checked(root: Root, size: int, builder: Side, name: str) -> Root:
    if not isinstance(root, Root):
        wrong: str | None = f"must return a Root, not {type(root).__name__}"
    else:
        wrong = _wrong(root.S, size)
    if wrong is not None:
        raise ConfigError(f"{getattr(builder, '__name__', builder)!r} of the metric {wrong} (for {name})")
    return root


def _wrong(S: Tensor | None, size: int) -> str | None:
    if S is None:
        return None
    if not isinstance(S, Tensor) or tuple(S.shape) not in {(size,), (size, size)}:
        return f"must return S of shape ({size},) or ({size}, {size}), not {tuple(getattr(S, 'shape', ()))}"
    if not S.isfinite().all() or not (S if S.ndim == 1 else S.diagonal()).all():
        return "returned S with entries that are NaN or infinite, or with zeros on its diagonal"
    rows = range(0, size if S.ndim == 2 else 0, ROWS_AT_ONCE)
    if any(S[i : i + ROWS_AT_ONCE, i:].triu(1).any() for i in rows):
        return "must return a lower triangular S, such as a Cholesky factor"
    return None
