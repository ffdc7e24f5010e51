"""Shrinkage of second moments of few tokens, against the best weight of the mean for known distributions."""

import pytest
import torch

from zssvd_lightning.whitening.shrinkage import shrinkage, shrunk_sum


@pytest.mark.parametrize("tokens", [4, 16, 64, 1024])
def test_the_weight_of_the_mean_is_about_the_best_one(tokens):
    """For Gaussian tokens, the error with the estimated weight is close to that with the best weight of a grid."""
    generator = torch.Generator().manual_seed(0)
    n = 24
    root = torch.randn(n, n, generator=generator) * torch.linspace(0.1, 1.0, n)
    own = root + 0.5 * torch.randn(n, n, generator=generator) * torch.linspace(0.1, 1.0, n)
    S, mean = own @ own.T, root @ root.T
    errors, best = [], torch.zeros(21)
    for _ in range(40):
        X = torch.randn(tokens, n, generator=generator) @ own.T
        A = X.T @ X / tokens
        found = shrunk_sum(X.T @ X, tokens, mean * 1000, 1000) / tokens
        errors.append((found - S).square().sum())
        best += torch.stack([(torch.lerp(A, mean, w) - S).square().sum() for w in torch.linspace(0, 1, 21).tolist()])
    assert torch.stack(errors).mean() < 1.25 * best.min() / 40
    assert torch.stack(errors).mean() <= 1.02 * best[0] / 40  # not worse than without


def test_the_weight_falls_with_the_number_of_tokens_and_is_one_for_equal_moments():
    A, mean = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)
    weights = [shrinkage(A, tokens, mean) for tokens in (1, 100, 1000)]
    assert weights[0] == 1.0
    assert weights[1] == pytest.approx(10 * weights[2])
    assert weights[1] == pytest.approx((3**2 + 5) / 100 / 1)
    assert shrinkage(A, 5, A) == 1.0


def test_sums_that_are_not_finite_stay_as_they_are():
    own, everyone = torch.eye(2), torch.full((2, 2), float("nan"))
    assert shrunk_sum(own, 3, everyone, 10) is own
