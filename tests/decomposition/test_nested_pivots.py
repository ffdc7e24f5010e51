"""One order whose first rows are pivots of several matrices at once."""

import itertools

import pytest
import torch

from zssvd_lightning.decomposition.nested_pivots import (
    GAIN,
    _exchange,
    _exchanges,
    _largest,
    _pivots_in,
    nested_order,
    nested_pivots,
)
from zssvd_lightning.errors import PivotError
from zssvd_lightning.layers.pivots import coefficients


def matrices(h, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(h, k, generator=generator, dtype=torch.float64) for k in ranks]


def product_of_volumes(M, order):
    return torch.stack([matrix[order[: matrix.shape[1]]].det().abs() for matrix in M]).prod()


@pytest.mark.parametrize("ranks", [(3,), (2, 3), (3, 3, 3), (4, 2, 3), (1, 8, 5), (8,), (8, 8, 2)])
def test_rows_are_pivots_and_coefficients_give_the_other_rows(ranks):
    M = matrices(8, ranks)
    order = nested_order(M)
    assert sorted(order.tolist()) == list(range(8))
    for matrix, k in zip(M, ranks, strict=True):
        C = coefficients(matrix, order)
        torch.testing.assert_close(C @ matrix[order[:k]], matrix[order[k:]])


@pytest.mark.parametrize("ranks", [(3,), (2, 3), (3, 3, 3), (1, 4, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_two_rows_would_increase_the_product_of_volumes_by_more(ranks, seed):
    M = matrices(9, ranks, seed)
    order = nested_order(M)
    reached = product_of_volumes(M, order)
    for first, second in itertools.combinations(range(9), 2):
        other = order.clone()
        other[first], other[second] = order[second], order[first]
        assert product_of_volumes(M, other) <= reached * GAIN * (1 + 1e-9)


def test_one_matrix_gets_rows_near_the_largest_volume():
    (M,) = matrices(10, (3,))
    best = max(M[list(rows)].det().abs() for rows in itertools.combinations(range(10), 3))
    assert M[nested_order([M])[:3]].det().abs() > 0.5 * best


def test_exchanges_keep_the_coefficients_of_the_order():
    M, order = matrices(12, (3, 5, 8)), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    C = [coefficients(matrix, order) for matrix in M]
    _exchange(C, order, [(0, 4), (2, 11), (6, 7), (3, 9), (8, 10)])  # within pivots, across, and within the others
    assert sorted(order.tolist()) == list(range(12))
    for part, matrix in zip(C, M, strict=True):
        torch.testing.assert_close(part, coefficients(matrix, order))


@pytest.mark.parametrize("ranks", [(60, 60, 60), (40, 70, 90)])
def test_coefficients_of_larger_matrices_are_bounded(ranks):
    M = matrices(200, ranks)
    order = nested_order(M)
    assert max(float(coefficients(matrix, order).abs().max()) for matrix in M) < 10


def test_scale_and_basis_of_a_matrix_have_no_effect():
    M = matrices(30, (6, 9))
    other = [1e4 * M[0], M[1] @ torch.randn(9, 9, dtype=torch.float64)]
    assert product_of_volumes(M, nested_order(other)) > 0.5 * product_of_volumes(M, nested_order(M))


def test_matrices_without_a_common_order_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[\(4, 2\), \(5, 2\)\] have no common order"):
        nested_order([torch.randn(4, 2), torch.randn(5, 2)])


def test_a_matrix_of_less_than_full_rank_gets_an_order():
    M = matrices(12, (4,))[0]
    M[:, 3] = M[:, 0] + M[:, 1]
    order = nested_order([M])
    torch.testing.assert_close(coefficients(M, order) @ M[order[:4]], M[order[4:]])


def test_exchanges_of_one_round_have_no_row_in_common():
    """Row 3 is a pivot of the second matrix and none of the first, so that it could go into both exchanges."""
    first, second = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    first[3 - 2, 0], second[5 - 4, 3] = 5.0, 4.0
    second[5 - 4, 0] = first[5 - 2, 0] = 1.0
    (pair,) = _exchanges([first, second], 6)
    assert pair == (0, 3)


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-9])
def test_the_largest_coefficient_is_right_for_matrices_that_nearly_lack_full_rank(smallest):
    M = [matrix.clone() for matrix in matrices(40, (6, 9))]
    M[1][:, 8] = M[1][:, 0] - M[1][:, 1] + smallest * M[1][:, 8]
    order, largest = nested_pivots(M)
    exact = max(float(coefficients(matrix, order).abs().max()) for matrix in M)
    assert largest == pytest.approx(exact, rel=0.1)
    assert exact < 5


def test_coefficients_in_float32_that_are_wrong_are_noticed():
    M = matrices(40, (6, 9))
    M[1][:, 8] = M[1][:, 0] - M[1][:, 1] + 1e-9 * M[1][:, 8]
    order, C = _pivots_in(torch.float32, M)
    assert _largest(C[0], M[0], order) < 5
    assert _largest(C[1], M[1], order) == float("inf")


def test_pivots_that_count_as_singular_are_noticed_although_their_coefficients_are_right():
    M, order = torch.tensor([[1, 1], [1e-17, 0], [3e-17, 0]], dtype=torch.float64), torch.arange(3)
    assert _largest(torch.tensor([[0.0, 3.0]]), M, order) == float("inf")
    with pytest.raises(ValueError, match="do not span the others"):
        coefficients(M, order)
    with pytest.raises(PivotError, match=r"shapes \[\(3, 2\)\]: the first 2 rows"):
        nested_order([M])


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_any_scale_get_an_order_with_its_coefficients_or_are_refused_by_name(seed):
    generator = torch.Generator().manual_seed(seed)
    for scale in (4, 10, 18):
        M = [matrix * 10 ** (scale * torch.randn(12, 1, generator=generator)) for matrix in matrices(12, (3, 5), seed)]
        try:
            order, largest = nested_pivots(M)
        except PivotError:
            continue
        assert max(float(coefficients(matrix, order).abs().max()) for matrix in M) <= 1.001 * largest + 1e-6


@pytest.mark.parametrize("ranks", [(50, 50), (30, 40, 70)])
def test_the_bound_of_coefficients_in_float32_is_close(ranks):
    M = [matrix.float() for matrix in matrices(300, ranks)]
    order, C = _pivots_in(torch.float32, M)
    for part, matrix in zip(C, M, strict=True):
        exact = float(coefficients(matrix, order).abs().max())
        assert exact <= _largest(part, matrix, order) <= exact + 1e-3


def test_a_row_that_several_matrices_need_is_a_pivot_of_all():
    """Rows 7 and 2 alone have a part in one direction of each matrix, so that both are pivots of both."""
    M = matrices(12, (3, 5))
    M[0][:, 0], M[1][:, 0] = 0, 0
    M[0][7, 0], M[1][7, 0], M[1][:, 1] = 1, 1, 0
    M[1][2, 1] = 1
    order = nested_order(M)
    assert 7 in order[:3]
    assert {2, 7} <= set(order[:5].tolist())


def test_rows_of_zeros_are_no_pivots():
    M = matrices(20, (4, 6))
    for matrix in M:
        matrix[5:15] = 0
    assert {*range(5), *range(15, 20)} >= set(nested_order(M)[:6].tolist())


@pytest.mark.parametrize("shapes", [[], [(4, 0), (4, 2)], [(3, 4)]])
def test_shapes_without_pivots_are_refused(shapes):
    with pytest.raises(ValueError, match="have no common order of rows"):
        nested_order([torch.randn(shape) for shape in shapes])


def test_matrices_of_different_rows_have_no_common_pivots():
    M = matrices(10, (2, 2))
    M[0][:5], M[1][5:] = 0, 0
    with pytest.raises(PivotError, match=r"shapes \[\(10, 2\), \(10, 2\)\]"):
        nested_order(M)
