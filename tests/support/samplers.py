"""Matrices of a defined class."""

import torch
from torch import Tensor


def weight(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64)


def rows(T: int, n: int) -> Tensor:
    """Correlated inputs (T, n), as activations are."""
    return torch.randn(T, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)


def second_moment(n: int) -> Tensor:
    X = rows(4 * n, n)
    return X.T @ X / len(X)


def singular_moment(n: int, rank: int) -> Tensor:
    X = torch.randn(4 * n, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    return X.T @ X / len(X)


SHAPES = [(6, 6), (9, 4), (4, 9)]
