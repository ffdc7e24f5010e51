"""Linear layers in 8 bits: integer codes and their scales.

Shapes: W (m, n), up (m, k), down (k, n). Imports only torch and transformers, so that a saved folder can contain a copy
of this file.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.layers.base import CompressedLinear, Dense
from zssvd_lightning.layers.low_rank import LowRankLinear

LARGEST_CODE = 127
"""Largest code: codes are in [-127, 127]."""


class EightBitLinear(CompressedLinear):
    """Base class of 8-bit layers, whose buffers do not change type when the model is cast.

    Attributes:
        dtype: floating-point type of the replaced layer.
        trainable: True if the weights of the replaced layer require gradients. The codes never do.
    """

    dtype: torch.dtype

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None) -> None:
        super().__init__(in_features, out_features)
        self.dtype = dtype or torch.get_default_dtype()
        self.trainable = True

    def fault(self) -> str | None:
        """See `CompressedLinear`. Codes must be at least -127, and scales positive."""
        for name, value in self.named_buffers():
            if value.is_meta or not value.numel():
                continue
            if value.dtype == torch.int8 and int(value.min()) < -LARGEST_CODE:
                return f"{name} has codes below {-LARGEST_CODE}"
            if name == "scale" and bool((value <= 0).any()):
                return f"{name} has scales that are not positive"
        return super().fault()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            now = self._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self


class Int8Linear(EightBitLinear):
    """Linear layer whose weight is stored in 8 bits: `W = diag(scale) codes`.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        bias: True to add a bias (m,).

    Attributes:
        codes: int8 (m, n).
        scale: bfloat16 (m,), one scale per row.
    """

    kind = "int8"
    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.bfloat16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        return {} if f"{name}.codes" in weights else None

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Dense) -> "Int8Linear":
        """Round a dense layer to 8 bits. Each row is scaled so that its largest entry becomes the largest code."""
        W = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).float()
        new = cls.like(layer).to_empty(device=W.device)
        new.scale.copy_(bfloat16_scale(W.abs().amax(1)))
        new.codes.copy_(rounded(W, new.scale[:, None]))
        if new.bias is not None:
            new.bias.copy_(layer.bias)
        return new

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind}

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`."""
        return self._dense()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        return linear(x, self._dense().to(x.dtype), self.bias)

    def _dense(self) -> Tensor:
        return self.codes * self.scale.float()[:, None]


class Int8LowRankLinear(EightBitLinear):
    """Linear layer of rank k whose factors are stored in 8 bits, except some rows of `up` and columns of `down`.

    Both sides of a component share one scale: `up = [codes diag(scale); rest]` and `down = [diag(scale) codes, rest]`,
    up to a permutation of the rows of `up` and of the columns of `down`.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k.
        rows: number of rows of `up` in 16 bits.
        columns: number of columns of `down` in 16 bits.
        ordered: True if the rows or columns in 16 bits are not the last ones, so that permutations are stored.
        bias: True to add a bias (m,).

    Attributes:
        up_codes: int8 (m - rows, k).
        up_rest: float16 (rows, k), or None if `rows` is 0.
        down_codes: int8 (k, n - columns).
        down_rest: float16 (k, columns), or None if `columns` is 0.
        scale: bfloat16 (k,), one scale per component.
        out_order: int32 (m,), position of each output in the rows of `[codes; rest]`. None unless `ordered`.
        in_order: int32 (n,), index of the input at each column of `[codes, rest]`. None unless `ordered`.
    """

    kind = "int8_low_rank"
    permutations = ("out_order", "in_order")
    up_codes: Tensor
    up_rest: Tensor | None
    down_codes: Tensor
    down_rest: Tensor | None
    scale: Tensor
    out_order: Tensor | None
    in_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        rows: int = 0,
        columns: int = 0,
        ordered: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        m, n, k = out_features, in_features, rank

        def buffer(name: str, wanted: bool, dtype: torch.dtype, *shape: int) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if wanted else None)

        buffer("up_codes", True, torch.int8, m - rows, k)
        buffer("up_rest", rows > 0, torch.float16, rows, k)
        buffer("down_codes", True, torch.int8, k, n - columns)
        buffer("down_rest", columns > 0, torch.float16, k, columns)
        buffer("scale", True, torch.bfloat16, k)
        buffer("out_order", ordered, torch.int32, m)
        buffer("in_order", ordered, torch.int32, n)
        self.bias = nn.Parameter(torch.zeros(m, device=device, dtype=dtype)) if bias else None

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        if f"{name}.up_codes" not in weights:
            return None
        up, down = weights.get(f"{name}.up_rest"), weights.get(f"{name}.down_rest")
        return {
            "rank": weights[f"{name}.up_codes"].shape[1],
            "rows": 0 if up is None else len(up),
            "columns": 0 if down is None else down.shape[1],
            "ordered": f"{name}.out_order" in weights,
        }

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LowRankLinear, rows: Tensor, columns: Tensor) -> "Int8LowRankLinear":
        """Round a low-rank layer to 8 bits.

        The two sides of each component are balanced, so that the largest entry of each becomes the largest code.

        Args:
            layer: low-rank layer.
            rows: boolean (m,), true for the rows of `up` to store in 16 bits.
            columns: boolean (n,), true for the columns of `down` to store in 16 bits.
        """
        up, down = layer.up.weight.float(), layer.down.weight.float()
        rows, columns = rows.to(up.device), columns.to(up.device)
        outputs, inputs = rows.argsort(stable=True), columns.argsort(stable=True)
        ordered = bool(outputs.diff().ne(1).any() or inputs.diff().ne(1).any())
        sizes = {"rank": layer.rank, "rows": int(rows.sum()), "columns": int(columns.sum()), "ordered": ordered}
        new = cls.like(layer, **sizes).to_empty(device=up.device)

        shift, largest = balance(up[~rows], down[:, ~columns])
        up, down = up[outputs] * shift, down[:, inputs] / shift[:, None]
        new.scale.copy_(bfloat16_scale(largest))
        new.up_codes.copy_(rounded(up[: len(new.up_codes)], new.scale))
        new.down_codes.copy_(rounded(down[:, : new.down_codes.shape[1]], new.scale[:, None]))
        if new.up_rest is not None:
            new.up_rest.copy_(up[len(new.up_codes) :])
        if new.down_rest is not None:
            new.down_rest.copy_(down[:, new.down_codes.shape[1] :])
        if new.out_order is not None and new.in_order is not None:
            new.out_order.copy_(outputs.argsort())
            new.in_order.copy_(inputs)
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
        return new

    @property
    def rank(self) -> int:
        """Rank k, the size of the space between the two factors."""
        return len(self.scale)

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {
            "kind": self.kind,
            "rank": self.rank,
            "rows": 0 if self.up_rest is None else len(self.up_rest),
            "columns": 0 if self.down_rest is None else self.down_rest.shape[1],
            "ordered": self.out_order is not None,
        }

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`."""
        up, down = self.factors()
        return up @ down

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors up (m, k) and down (k, n) in float32, in the original order of outputs and inputs."""
        scale = self.scale.float()
        up = _joined(self.up_codes * scale, self.up_rest, 0)
        down = _joined(self.down_codes * scale[:, None], self.down_rest, 1)
        if self.out_order is not None and self.in_order is not None:
            up, down = up[self.out_order.long()], down[:, self.in_order.long().argsort()]
        return up, down

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        in_order, out_order = self.in_order, self.out_order  # as local variables, torch.jit.script knows their types
        up_rest, down_rest = self.up_rest, self.down_rest
        if in_order is not None:
            x = x.index_select(-1, in_order)
        scale, coded = self.scale.float(), self.down_codes.shape[1]
        z = linear(x[..., :coded], (self.down_codes * scale[:, None]).to(x.dtype))
        if down_rest is not None:
            z = z + linear(x[..., coded:], down_rest.to(x.dtype))
        y = linear(z, (self.up_codes * scale).to(z.dtype))
        if up_rest is not None:
            y = torch.cat([y, linear(z, up_rest.to(z.dtype))], -1)
        if out_order is not None:
            y = y.index_select(-1, out_order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the two sides of each component, so that their largest entries are equal.

    Args:
        up: rows of `up` to be rounded (any number, k).
        down: columns of `down` to be rounded (k, any number).

    Returns:
        Factors (k,) that multiply the columns of `up` and divide the rows of `down`, and the largest entry (k,) of each
        component after this scaling.
    """
    largest_up, largest_down = _largest(up, 0), _largest(down, 1)
    return (largest_down / largest_up).sqrt(), (largest_up * largest_down).sqrt()


def bfloat16_scale(largest: Tensor) -> Tensor:
    """Return bfloat16 scales at which no entry up to `largest` exceeds the largest code; 1 where `largest` is 0."""
    exact = largest.cpu().double() / LARGEST_CODE  # MPS has no float64
    scale = exact.bfloat16()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.double() < exact, above, scale)
    return torch.where(largest.cpu() > 0, scale, torch.ones_like(scale)).to(largest.device)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest codes, as floats in [-127, 127]."""
    return (values / scale.float()).round().clamp(-LARGEST_CODE, LARGEST_CODE)


def _largest(values: Tensor, dim: int) -> Tensor:
    """Return the largest absolute entry of each component (k,), or 1 where all entries are 0."""
    largest = values.abs().amax(dim) if values.shape[dim] else values.sum(dim)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _joined(codes: Tensor, rest: Tensor | None, dim: int) -> Tensor:
    return codes if rest is None else torch.cat([codes, rest.float()], dim)
