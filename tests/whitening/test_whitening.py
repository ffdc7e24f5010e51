import warnings

import pytest
import torch
from support.samplers import SHAPES, rows, second_moment, singular_moment, weight

from zssvd_lightning.errors import NotPositiveDefiniteError, RankDeficientWarning
from zssvd_lightning.whitening.cholesky import FIRST_JITTER, Root, Whitening, safe_cholesky, warn_of_jitter
from zssvd_lightning.whitening.spectrum import Spectrum


@pytest.mark.parametrize("n", [1, 4, 17])
def test_factor_of_a_definite_moment_is_exact_and_needs_no_jitter(n):
    A = second_moment(n)
    L, jitter = safe_cholesky(A, "layer")
    torch.testing.assert_close(L @ L.T, A)
    assert torch.equal(L, L.tril())
    assert jitter == 0


def test_singular_moment_gets_the_smallest_jitter_that_works():
    A = singular_moment(12, rank=5)
    L, jitter = safe_cholesky(A, "model.layer")
    scale = float(A.diagonal().mean())
    assert 0 < jitter <= 1e-6
    torch.testing.assert_close(L @ L.T, A + jitter * scale * torch.eye(12), atol=1e-9 * scale, rtol=0)
    assert torch.linalg.cholesky_ex(A + jitter / 10 * scale * torch.eye(12)).info > 0 or jitter == FIRST_JITTER


def test_one_warning_names_the_singular_layers_and_their_jitter():
    jitters = {"q": 1e-8, "fine": 0.0, "o": 1e-7}
    with pytest.warns(RankDeficientWarning, match="second moment: 2.*q 1e-08, o 1e-07") as caught:
        warn_of_jitter(jitters)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_jitter({"fine": 0.0})


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.tensor([[1.0, 5.0], [5.0, 1.0]])])
def test_what_is_no_second_moment_is_refused_by_name(A):
    with pytest.raises(NotPositiveDefiniteError, match=r"model\.layer"):
        safe_cholesky(A, "model.layer")


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_error_of_the_output_is_the_sum_of_dropped_squares(shape):
    W, X = weight(*shape), rows(200, shape[1])
    whitening = Whitening(Root(*safe_cholesky(X.T @ X / len(X), "layer")))
    spectrum = Spectrum.of(W, whitening)
    for k in range(1, min(shape) + 1):
        up, down = spectrum.factors(torch.arange(k))
        error = (X @ (W - up @ down).T).square().sum() / len(X)
        torch.testing.assert_close(error, spectrum.sigma[k:].square().sum(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_truncation_of_that_rank_has_a_smaller_output_error(shape):
    W, X = weight(*shape), rows(200, shape[1])
    spectrum = Spectrum.of(W, Whitening(Root(*safe_cholesky(X.T @ X / len(X), "layer"))))
    up, down = spectrum.factors(torch.arange(2))
    best = (X @ (W - up @ down).T).square().sum()
    for _ in range(50):
        other = (up + 0.05 * torch.randn_like(up)) @ (down + 0.05 * torch.randn_like(down))
        assert (X @ (W - other).T).square().sum() >= best


def test_unwhitening_undoes_whitening():
    W, whitening = weight(5, 7), Whitening(Root(*safe_cholesky(second_moment(7), "layer")))
    torch.testing.assert_close(whitening.unwhiten(whitening.whiten(W)), W)
    assert torch.equal(Whitening().whiten(W), W)
