import pytest
from hypothesis import given
from hypothesis import strategies as st

from zssvd_lightning.budget import Budget
from zssvd_lightning.storage import STORAGES, break_even_rank

sizes = st.integers(1, 300)


@given(m=sizes, n=sizes)
def test_break_even_is_the_last_rank_that_saves(m, n):
    k = break_even_rank(m, n)
    assert k * (m + n) < m * n <= (k + 1) * (m + n)


@pytest.mark.parametrize("storage", STORAGES)
@given(m=sizes, n=sizes, rank=st.integers(0, 300))
def test_nothing_is_stored_at_more_than_its_dense_size(storage, m, n, rank):
    kept = STORAGES[storage]
    assert kept.cost(m, n, rank) <= kept.dense(m, n) <= m * n
    assert kept.low_rank(m, n, kept.highest_rank(m, n) + 1) >= kept.dense(m, n)


@pytest.mark.parametrize(("shape", "rank"), [((576, 576), 287), ((1536, 576), 418), ((192, 576), 143)])
def test_break_even_of_real_shapes(shape, rank):
    assert break_even_rank(*shape) == rank


def test_floor_is_a_share_of_break_even_and_never_zero():
    budget = Budget({"a": (576, 576)}, 0.2, 0.3)
    assert budget.floor("a") == 87
    assert Budget({"a": (576, 576)}, 0.2).floor("a") == 1
