import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from zssvd_lightning.compression.quantization import in_8_bits
from zssvd_lightning.errors import BudgetError
from zssvd_lightning.layers.registry import form_for
from zssvd_lightning.layers.storage import UNITS, break_even_rank
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.storages import STORAGES

sizes = st.integers(1, 300)


@given(m=sizes, n=sizes)
def test_break_even_is_the_last_rank_that_saves(m, n):
    k = break_even_rank(m, n)
    assert k * (m + n) < m * n <= (k + 1) * (m + n)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=50, deadline=None)
@given(m=sizes, n=sizes)
def test_costs_rise_with_the_rank_up_to_the_highest_that_saves(storage, unit, m, n):
    kept, full = STORAGES[storage], min(m, n)
    costs, highest = kept.costs(m, n, unit), kept.highest_rank(m, n, unit)
    dense = kept.dense_cost(m, n, unit)
    assert len(costs) == full + 1
    assert 0 <= highest < full
    assert all(costs[k] == kept.low_rank_cost(m, n, k, unit) < dense for k in range(1, highest + 1))
    assert list(costs[1:]) == sorted(costs[1:])
    assert set(costs[highest + 1 :]) == {dense}
    assert highest + 1 == full or kept.low_rank_cost(m, n, highest + 1, unit) >= dense


@given(m=sizes, n=sizes)
def test_highest_ranks_in_parameters(m, n):
    highest = {name: kept.highest_rank(m, n) for name, kept in STORAGES.items()}
    assert highest["factors"] == highest["mixed"] == break_even_rank(m, n)
    assert highest["pivoted"] == highest["remap"] == min(m, n) - 1
    assert highest["hq"] in (break_even_rank(m, n), break_even_rank(m, n) - 1)


def saved_bytes(layer):
    """Of a layer in a bfloat16 model."""
    return sum(tensor.nbytes for tensor in layer.bfloat16().state_dict().values())


def stored_as(storage, m, n, k):
    """The layer that a storage makes of (m, n) at rank k, None being dense."""
    layer, up, down = torch.nn.Linear(n, m, bias=False), torch.randn(m, k or 1), torch.randn(k or 1, n)
    if k is not None:
        layer = form_for(STORAGES[storage].layer, m, n).from_factors(up, down, None)
    return in_8_bits({"layer": layer}, storage).get("layer", layer) if STORAGES[storage].rounds else layer


@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize(("m", "n"), [(12, 12), (20, 9), (9, 20)])
@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq"])
def test_bytes_are_those_of_the_modules(storage, m, n, k):
    budget = Budget({"a": (m, n)}, 0.5, storage=storage, unit="bytes", planned=True)
    assert saved_bytes(stored_as(storage, m, n, k)) == budget.kept_of("a", k)
    if storage in ("factors", "hq"):
        mixed = Budget({"a": (m, n)}, 0.5, storage="mixed", unit="bytes", planned=True)
        assert mixed.kept_of("a", k, eight_bit=storage == "hq") == budget.kept_of("a", k)


class Counting(TorchDispatchMode):
    """Counts multiplications of matrices."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.products += left.numel() * right.shape[1]
        return out


@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq"])
def test_flops_are_those_of_the_forward(storage, k):
    layer = stored_as(storage, 20, 9, k)
    with torch.no_grad(), Counting() as seen:
        layer(torch.randn(1, 9))
    assert 2 * seen.products == Budget({"a": (20, 9)}, 0.5, storage=storage, unit="flops", planned=True).kept_of("a", k)


def test_pivoting_saves_the_square_of_the_rank():
    pivoted, factors = STORAGES["pivoted"], STORAGES["factors"]
    for k in range(1, 9):
        assert pivoted.low_rank_cost(20, 9, k) == factors.low_rank_cost(20, 9, k) - k**2


@pytest.mark.parametrize(("shape", "rank"), [((576, 576), 287), ((1536, 576), 418), ((192, 576), 143)])
def test_break_even_of_real_shapes(shape, rank):
    assert break_even_rank(*shape) == rank


def test_floor_is_a_share_of_break_even_and_never_zero():
    budget = Budget({"a": (576, 576)}, 0.2, 0.3)
    assert budget.floor("a") == 87
    assert Budget({"a": (576, 576)}, 0.2).floor("a") == 1


@pytest.mark.parametrize("unit", UNITS)
def test_refusals_name_the_unit(unit):
    with pytest.raises(BudgetError, match=rf"prune_ratio 0.99 asks for [\d,]+ of [\d,]+ {unit}, .* at most"):
        Budget({"a": (16, 16)}, 0.99, unit=unit)


def test_storage_alone_reaches_what_8_bits_save_in_that_unit():
    shapes = {"a": (64, 64)}
    with pytest.raises(BudgetError, match=r"0\.5 of the parameters is reached by storage 'hq' alone"):
        Budget(shapes, 0.5, storage="hq")
    with pytest.raises(BudgetError, match=r"0\.48 of the bytes is reached by storage 'hq' alone"):
        Budget(shapes, 0.48, storage="hq", unit="bytes")
    assert Budget(shapes, 0.5, storage="hq", unit="bytes").total == 2 * 64 * 64  # scales take their part
    assert Budget(shapes, 0.1, storage="hq", unit="flops").kept({"a": None}) == 2 * 64 * 64
    assert Budget(shapes, 0.1, storage="mixed", unit="bytes").kept({"a": None}, {"a"}) == 64 * 64 + 2 * 64


def test_mixed_storage_may_reach_further_than_16_bits():
    shapes = {"a": (64, 64)}
    with pytest.raises(BudgetError, match="at most"):
        Budget(shapes, 0.97, unit="bytes")
    assert Budget(shapes, 0.97, storage="mixed", unit="bytes").reached({"a": 1}, {"a"}) > 0.97


def test_bits_are_counted_only_where_they_can_be_chosen():
    with pytest.raises(ValueError, match="'factors' leaves no choice of bits"):
        Budget({"a": (16, 16)}, 0.3).kept({"a": 2}, {"a"})


def test_the_same_ranks_in_another_unit():
    budget = Budget({"a": (20, 12), "b": (12, 12)}, 0.4, storage="mixed", unit="bytes")
    counted = budget.counted_in("parameters")
    assert budget.kept({"a": 3, "b": None}, {"a"}) == 3 * 32 + 2 * 3 + 2 * 144
    assert counted.kept({"a": 3, "b": None}, {"a"}) == 3 * 32 // 2 + 144
    assert counted.total == 20 * 12 + 144
