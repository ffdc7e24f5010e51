"""Elimination of several matrices at once: order of the rows, and their coefficients."""

import pytest
import torch

from zssvd_lightning.decomposition import joint_elimination
from zssvd_lightning.decomposition.joint_elimination import eliminated
from zssvd_lightning.errors import PivotError


def matrices(h, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(h, k, generator=generator, dtype=torch.float64) for k in sorted(ranks)]


def greedy_order(M):
    """The pivots one by one, by distances from the span of the rows before them, each from a projection of its own."""
    bases, chosen = [torch.linalg.qr(matrix).Q for matrix in M], []
    for t in range(M[-1].shape[1]):
        products = torch.ones(len(M[0]), dtype=torch.float64)
        for basis in bases:
            if basis.shape[1] > t:
                span = torch.linalg.qr(basis[chosen].T).Q
                products *= (basis - basis @ span @ span.T).norm(dim=1)
        products[chosen] = 0
        chosen.append(int(products.argmax()))
    return chosen


@pytest.mark.parametrize("ranks", [(4,), (6, 3), (5, 5, 5), (2, 7, 4)])
def test_one_row_at_a_time_is_greedy(ranks, monkeypatch):
    monkeypatch.setattr(joint_elimination, "AT_ONCE", 1)
    M = matrices(20, ranks)
    order, _ = eliminated(M)
    assert order[: max(ranks)].tolist() == greedy_order(M)


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize("ranks", [(4,), (6, 3), (5, 5, 5), (2, 7, 4), (20, 8)])
def test_coefficients_are_those_of_the_order(ranks, group, monkeypatch):
    monkeypatch.setattr(joint_elimination, "AT_ONCE", group)
    M = matrices(20, ranks)
    order, found = eliminated(M)
    assert sorted(order.tolist()) == list(range(20))
    for C, matrix in zip(found, M, strict=True):
        k = matrix.shape[1]
        torch.testing.assert_close(C @ matrix[order[:k]], matrix[order[k:]])


def test_pivots_beyond_the_rank_have_coefficients_of_zero():
    M = matrices(15, (3, 6))
    M[1][:, 4:] = M[1][:, :4] @ torch.randn(4, 2, dtype=torch.float64)
    order, (_, C) = eliminated(M)
    assert not C[:, 4:].any()
    torch.testing.assert_close(C @ M[1][order[:6]], M[1][order[6:]])


def test_matrices_without_a_row_in_common_are_refused():
    M = matrices(10, (2, 2))
    M[0][:5], M[1][5:] = 0, 0
    with pytest.raises(PivotError, match=r"shapes \[\(10, 2\), \(10, 2\)\] have no common order .* 1 pivots or more"):
        eliminated(M)


@pytest.mark.parametrize("k", [1, 4, 5, 17])
def test_division_by_a_triangular_matrix(k, monkeypatch):
    monkeypatch.setattr(joint_elimination, "LEAF", 4)
    U = torch.randn(k, k, dtype=torch.float64).triu() + 5 * torch.eye(k, dtype=torch.float64)
    B = torch.randn(7, k, dtype=torch.float64)
    torch.testing.assert_close(joint_elimination._over_upper(B.clone(), U) @ U, B)
