"""What processes tell each other, against the same done on one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import processes
from torch import nn

from zssvd_lightning.decomposition.work_sharing import share_out, svd_work, whitening_work
from zssvd_lightning.distributed import Replicas, Shards, Team
from zssvd_lightning.errors import ProcessFailedError
from zssvd_lightning.model.targets import find_targets

LENGTHS = (1, 2, 4, 7, 9)


def matrices(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 5, generator=g, dtype=torch.float64) for length in LENGTHS]


def in_process_group(rank: int, size: int) -> None:
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=size)


def replicas(rank: int, size: int, folder: Path) -> None:
    in_process_group(rank, size)
    team = Replicas(torch.device("cpu"))
    own, sums = matrices(rank), [sum(parts) for parts in zip(*map(matrices, range(size)), strict=True)]
    for owner in range(size):
        for mine, expected in zip(own, sums, strict=True):
            kept = mine.clone()
            found = team.sum_at(owner, mine.T, len(mine), 1)
            assert found is None if rank != owner else torch.allclose(found, expected.T)
            assert torch.equal(mine, kept)
            whole = matrices(owner)[0] if rank == owner else None
            like = torch.empty(0)
            received = team.from_owner(owner, whole, (1, 5), like)
            assert torch.equal(received, matrices(owner)[0].float())
            torch.testing.assert_close(team.over_batches(mine), expected)
    everyone(team, rank, size)


def shards(rank: int, size: int, folder: Path) -> None:
    in_process_group(rank, size)
    team = Shards(torch.device("cpu"), [], None)
    for whole in matrices(0):
        for split, W in ((0, whole), (1, whole.T)):
            chunks = [*whole.chunk(size), *[whole[:0]] * size]
            part = team.part(W, split)
            assert torch.equal(part if split == 0 else part.T, chunks[rank])
            assert torch.equal(team.whole(part, len(whole), split), W)
            for owner in range(size):
                found = team.weight_at(owner, part, len(whole), split)
                assert found is None if rank != owner else torch.equal(found, W)
        for owner in range(size):
            received = team.from_owner(owner, whole if rank == owner else None, whole.shape, torch.empty(0))
            assert torch.equal(received, team.part(whole).float())
        torch.testing.assert_close(team.over_rows(team.part(whole).sum()), whole.sum())
    everyone(team, rank, size)


def everyone(team: Team, rank: int, size: int) -> None:
    assert (team.rank, team.size) == (rank, size)
    assert team.gathered(rank * 10) == [10 * r for r in range(size)]
    assert team.decide_on_first(lambda: f"by {rank}") == "by 0"
    with team.together():
        pass
    failing = size - 1
    with (
        pytest.raises(
            KeyError if rank == failing else ProcessFailedError,
            match="gone" if rank == failing else f"process {failing} of {size} failed: KeyError: 'gone'",
        ),
        team.together(),
    ):
        if rank == failing:
            raise KeyError("gone")
    with pytest.raises(ValueError if rank == 0 else ProcessFailedError):
        team.decide_on_first(lambda: int("none"))
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [replicas, shards])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes(tmp_path, work, size):
    processes.check(tmp_path, processes.start(tmp_path, size, work))


@given(
    shapes=st.lists(st.tuples(st.integers(3, 60), st.integers(3, 60)), min_size=1, max_size=9), size=st.integers(1, 4)
)
def test_work_is_shared_out_as_evenly_as_the_greedy_rule_promises(shapes, size):
    model = nn.ModuleList(nn.Linear(n, m) for m, n in shapes)
    targets = find_targets(model)
    shares = share_out(targets, {name: name for name in targets}, size)
    assert sorted(name for share in shares for name in share) == sorted(targets)
    work = {n: svd_work(*t.shape) + whitening_work(t.shape[1]) for n, t in targets.items()}
    loads = [sum(work[name] for name in share) for share in shares]
    least_possible = max(*work.values(), sum(work.values()) / size)
    assert max(loads) <= (4 / 3 - 1 / (3 * size)) * best(list(work.values()), size) + 1e-6
    assert max(loads) >= least_possible - 1e-6


def best(work: list[float], size: int) -> float:
    """The least that the busiest of `size` processes can have, found by trying everything."""
    loads = {(0.0,) * size}
    for item in sorted(work, reverse=True):
        loads = {tuple(sorted((*load[:k], load[k] + item, *load[k + 1 :]))) for load in loads for k in range(size)}
    return min(max(load) for load in loads)


def test_layers_that_share_an_input_stay_together():
    model = nn.ModuleDict({name: nn.Linear(20, 10) for name in "qkvabcd"})
    shares = share_out(find_targets(model), dict.fromkeys("qkv", "q") | {n: n for n in "abcd"}, 3)
    assert ["q", "k", "v"] in shares
