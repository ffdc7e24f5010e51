import math

import pytest
import torch
from support.samplers import SHAPES, weight

from zssvd_lightning.whitening import svd
from zssvd_lightning.whitening.svd import thin_svd


def with_values(m, n, sigma):
    """A matrix (m, n) in float32 with given singular values."""
    U, _, Vh = torch.linalg.svd(weight(m, n), full_matrices=False)
    return (U * sigma @ Vh).float()


def steps(r, *levels):
    """Equal numbers of equal singular values."""
    return torch.tensor(levels, dtype=torch.float64).repeat_interleave(-(-r // len(levels)))[:r]


def low_rank(m, n):
    return (weight(m, min(m, n) // 2) @ weight(min(m, n) // 2, n)).float()


KINDS = {
    **{
        f"condition 1e{e}": lambda m, n, e=e: with_values(m, n, torch.logspace(0, -e, min(m, n)).double())
        for e in (3, 7, 12, 20)
    },
    "clusters": lambda m, n: with_values(m, n, steps(min(m, n), 1.0, 1e-6)),
    "clusters at the bound": lambda m, n: with_values(m, n, steps(min(m, n), 1.0, 1.1 * svd.ACCURATE, 1e-9)),
    "half the rank": low_rank,
    "half the rank and rounding": lambda m, n: low_rank(m, n) * (1 + 1e-7 * weight(m, n).float()),
    "half the rank and a step": lambda m, n: low_rank(m, n) + 1e-4 * torch.outer(*(torch.randn(k) for k in (m, n))),
    "zero": torch.zeros,
    "zero columns": lambda m, n: weight(m, n).float() * (torch.arange(n) % 2),
    "one entry": lambda m, n: torch.eye(m, n) * (torch.arange(n) == 0),
    "ones": torch.ones,
    "huge": lambda m, n: 1e30 * low_rank(m, n),
    "tiny": lambda m, n: 1e-35 * low_rank(m, n),
}


@pytest.mark.parametrize("shape", [(30, 30), (50, 30), (30, 50), (1, 7), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_svd_of_any_rank_is_valid_and_as_accurate_as_one_in_float64(kind, shape, monkeypatch):
    Z, r = KINDS[kind](*shape), min(shape)
    expected = torch.linalg.svdvals(Z.double())
    monkeypatch.setattr(torch.linalg, "svd", None)  # none is paid for
    U, sigma, Vh = thin_svd(Z)
    assert (U.shape, sigma.shape, Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
    assert {part.dtype for part in (U, sigma, Vh)} == {torch.float32}
    assert (sigma[1:] <= sigma[:-1]).all()
    assert (sigma >= 0).all()
    largest = float(expected[0])
    torch.testing.assert_close(sigma.double(), expected, rtol=2e-6, atol=1e-10 * largest)
    torch.testing.assert_close(U.double() * sigma.double() @ Vh.double(), Z.double(), rtol=0, atol=1e-7 * largest)
    for basis in (U.T, Vh):
        torch.testing.assert_close(basis @ basis.T, torch.eye(r), rtol=0, atol=1e-5)


def test_only_the_part_of_a_matrix_that_is_inaccurate_is_decomposed_again(monkeypatch):
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: sizes.append(len(A)) or eigh(A))
    thin_svd(with_values(40, 30, torch.logspace(0, -4, 30).double()))
    assert sizes == [30]
    thin_svd(with_values(40, 30, steps(30, 1.0, svd.ACCURATE / 10, svd.NEGLIGIBLE / 10)))
    assert sizes[1:3] == [30, 20]
    assert sum(sizes[3:]) <= 20


@pytest.mark.parametrize("shape", SHAPES)
def test_an_svd_that_does_not_converge_is_tried_once_more(shape, monkeypatch):
    svd, Z, calls = torch.linalg.svd, weight(*shape).float(), []

    def never(M):
        raise torch.linalg.LinAlgError("did not converge")

    def fails_once(M, **kwargs):
        calls.append(M)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(M, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", never)
    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    U, sigma, Vh = thin_svd(Z)
    assert len(calls) == 2
    assert {part.dtype for part in (U, sigma, Vh)} == {torch.float32}
    assert (U.shape, Vh.shape) == ((shape[0], min(shape)), (min(shape), shape[1]))
    torch.testing.assert_close(U * sigma @ Vh, Z)
    torch.testing.assert_close(sigma, svd(Z, full_matrices=False)[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_an_svd_in_float32_has_small_singular_values_right(shape, smallest):
    """Against one in float64; bidiagonalisation in float32 has those of 1e-6 wrong by tens of per cent."""
    U, _, Vh = torch.linalg.svd(weight(*shape), full_matrices=False)
    Z = (U * torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64) @ Vh).float()
    expected = torch.linalg.svdvals(Z.double())
    U, sigma, Vh = thin_svd(Z)
    torch.testing.assert_close(sigma.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(U * sigma @ Vh, Z, rtol=0, atol=1e-6)
    for basis in (U.T, Vh):
        torch.testing.assert_close(basis @ basis.T, torch.eye(min(shape)), rtol=0, atol=1e-5)


def test_an_svd_of_what_is_not_finite_fails():
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        thin_svd(torch.full((4, 3), torch.nan))
