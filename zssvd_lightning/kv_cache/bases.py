"""Low-rank bases of keys and values: the closed form, and the tensors that encode and decode.

A cached vector x (d,) of a head is kept as `c = down (x - mean)` (r,) and read as `up c + mean`. What reads it is
described by a second moment S: keys are read by queries, `S = E[q q^T]`, and values by the output projection,
`S = sum_h W_h W_h^T`. With `S = R R^T`, C the second moment of `x - mean`, and the eigenvectors U of

    R^T C R = U diag(error) U^T,     error descending,

`down = U_r^T R^T` and `up = R^-T U_r` are of least error among all affine maps of rank r, and the sum of the entries of
`error` from r on is that error: `E[(q^T (x - x_r))^2]` for independent q and x, or `E[|| W^T (x - x_r) ||^2]`. This is
KQ-SVD (arXiv 2512.05916) with two changes. Keys are taken as deviations from their mean, since the same key added to
all keys changes no softmax. Values are taken as they are, since those that receive most attention are near zero, far
from the mean. And tokens count by the attention that they receive (`attention.py`).

Shapes: H heads of width d, of ranks r_h with sum R.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zssvd_lightning.kv_cache.moments import LayerMoments
from zssvd_lightning.whitening.cholesky import safe_cholesky

DAMPING = 1e-4
"""Damping of S, relative to the mean of its diagonal. It bounds the entries of `up`, for caches in bfloat16."""


@dataclass(frozen=True)
class HeadSpectrum:
    """All components of one head, those of largest error first."""

    down: Tensor
    """`U^T R^T` (d, d): the first r rows encode at rank r."""
    up: Tensor
    """`R^-T U` (d, d): the first r columns decode at rank r."""
    mean: Tensor
    """Mean of the keys (d,); zeros for values."""
    errors: Tensor
    """Error (d,) that each component adds when it is dropped, descending."""

    @classmethod
    def of(cls, C: Tensor, S: Tensor, mean: Tensor, name: str, damping: float = DAMPING) -> "HeadSpectrum":
        """Return the closed form for the second moment C (d, d) of deviations, and readers S (d, d), in float64.

        A head that nothing reads (S of zeros) has errors of zero.

        Raises:
            NotPositiveDefiniteError: S has negative directions. The message has `name`.
        """
        unread = not S.any()
        R = torch.eye(len(S)).to(S) if unread else safe_cholesky(S, name, damping, "readers'")[0]
        errors, U = torch.linalg.eigh(R.T @ C @ R)
        errors, U = errors.flip(0).clamp_min(0), U.flip(1)
        up: Tensor = torch.linalg.solve_triangular(R.T, U, upper=True)
        return cls((R @ U).T, up, mean, torch.zeros_like(errors) if unread else errors)


def key_spectra(moments: LayerMoments, layer: int) -> list[HeadSpectrum]:
    """Return the spectrum of the keys of each head. Errors are those of the logits: mean squares, without a unit."""
    parts = zip(moments.keys.covariance(), moments.queries.second_moment(), moments.keys.mean(), strict=True)
    return [
        HeadSpectrum.of(C, moments.scaling**2 * S, mean, f"the keys of layer {layer}, head {head}")
        for head, (C, S, mean) in enumerate(parts)
    ]


def value_spectra(moments: LayerMoments, layer: int) -> list[HeadSpectrum]:
    """Return the spectrum of the values of each head. Errors are relative to the mean square of the values as read.

    An error e of a logit moves the result of a head by about e times the size of its values, so that errors of keys and
    values can be compared, and added.
    """
    squares = moments.values.second_moment()
    alike = torch.eye(squares.shape[-1]).to(squares).expand_as(squares)
    readers = alike if moments.output is None else moments.output
    found = []
    for head, (C, S) in enumerate(zip(squares, readers, strict=True)):
        size = (S * C).sum()
        scaled = S / size if size > 0 else torch.zeros_like(S)
        found.append(HeadSpectrum.of(C, scaled, torch.zeros_like(C[0]), f"the values of layer {layer}, head {head}"))
    return found


@dataclass
class Bases:
    """Bases of the keys or the values of one layer."""

    down: Tensor
    """Rows that encode (R, d), those of one head after the other."""
    up: Tensor
    """Rows that decode (R, d)."""
    mean: Tensor
    """Means of the keys (H, d); zeros for values."""
    ranks: tuple[int, ...]
    """Rank of each head."""
    _cast: dict[tuple[torch.device, torch.dtype], "Bases"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, spectra: list[HeadSpectrum], ranks: tuple[int, ...]) -> "Bases":
        """Return the bases at the given ranks, in float32."""
        pairs = list(zip(spectra, ranks, strict=True))
        down = torch.cat([head.down[:rank] for head, rank in pairs])
        up = torch.cat([head.up[:, :rank].T for head, rank in pairs])
        return cls(down.float(), up.float(), torch.stack([head.mean for head in spectra]).float(), ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """Number H of heads, and their width d."""
        return self.mean.shape[0], self.mean.shape[1]

    def cast(self, device: torch.device, dtype: torch.dtype) -> "Bases":
        """Return these bases on a device and in a type. They are made once for all caches."""
        place = (device, dtype)
        if place not in self._cast:
            with torch.inference_mode(False):  # so that they serve calls with gradients later
                down, up, mean = (tensor.to(device, dtype) for tensor in (self.down, self.up, self.mean))
            self._cast[place] = Bases(down, up, mean, self.ranks)
        return self._cast[place]

    def encode(self, X: Tensor) -> Tensor:
        """Return the numbers (B, T, R) kept of vectors X (B, H, T, d). A head of full rank is kept as it is."""
        heads = zip(X.unbind(1), torch.split(self.down, list(self.ranks)), self.mean, strict=True)
        whole = X.shape[-1]
        return torch.cat([x if len(down) == whole else (x - mean) @ down.T for x, down, mean in heads], -1)

    def decode(self, kept: Tensor) -> Tensor:
        """Return vectors (B, H, T, d) from the numbers kept of them (B, T, R)."""
        heads = zip(
            torch.split(kept, list(self.ranks), -1), torch.split(self.up, list(self.ranks)), self.mean, strict=True
        )
        whole = self.mean.shape[-1]
        return torch.stack([c if len(up) == whole else c @ up + mean for c, up, mean in heads], 1)
