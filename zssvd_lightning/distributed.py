"""All that the processes of a compression say to each other, but for checkpoints: the only place with collectives.

A `Team` is the processes that compress one model together. What a process holds of a layer depends on how it trains:

|            | weights and factors | second moments, gradients | batches          |
|------------|---------------------|---------------------------|------------------|
| `Team`     | whole               | whole                     | all              |
| `Replicas` | whole, all the same | sums over its own batches | its own          |
| `Shards`   | some rows           | the same rows of the sums | its own          |

Second moments of the gradients by outputs are whole sums over its own batches at every process of either.

Every layer has an owner, the process that brings its weight and statistics together, decomposes it and hands out the
factors. Methods marked as collective must be called by all processes of the team, in the same order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from zssvd_lightning.errors import CalibrationError, ProcessFailedError
from zssvd_lightning.statistics import Moments, accumulated, not_shared_alike
from zssvd_lightning.targets import Target

T = TypeVar("T")

# torch 2.13 has other names for them than the releases before
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Team:
    """One process on its own, and the pattern for several.

    Attributes:
        rank: number of this process.
        size: how many processes there are.
        gradients_divided_by: what the training divides the sum of all processes' gradients by.
        whole_everywhere: whether each process has all of every weight.
    """

    rank = 0
    size = 1
    gradients_divided_by = 1
    whole_everywhere = True

    @property
    def device(self) -> torch.device:
        """Where tensors have to be that are sent."""
        return torch.device("cpu")

    def gathered(self, mine: T) -> list[T]:
        """What each process has, by rank. Collective."""
        return [mine]

    def decided(self, choose: Callable[[], T]) -> T:
        """What the first process chooses. Collective."""
        return choose()

    def together(self) -> AbstractContextManager[None]:
        """An error within the block, which may differ from process to process, is raised on all. Collective.

        Raises:
            ProcessFailedError: on processes without an error of their own.
        """
        return nullcontext()

    def inputs(self, into: Moments, targets: Mapping[str, Target]) -> AbstractContextManager[Moments]:
        """Gives what the second moments of a batch are added to, from where they come `into` the statistics."""
        return nullcontext(into)

    def inputs_seen(self) -> None:
        """Is called once a forward pass is over. Raises CalibrationError when not all inputs were taken in."""

    def weight_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        """A weight at its owner, None at the others. Collective.

        Args:
            owner: rank of the process that needs it.
            part: what this process holds.
            length: size of the whole along `split`.
            split: dimension along which shards are cut.
        """
        return part

    def sum_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        """A statistic over all batches at its owner, None at the others; arguments as in `weight_at`. Collective."""
        return part

    def over_batches(self, part: Tensor) -> Tensor:
        """What this process holds of a statistic, over the batches of all. Collective."""
        return part

    def total_at(self, owner: int, own: Tensor) -> Tensor | None:
        """A statistic over all batches at its owner, of which each process has all over its own. Collective."""
        return own

    def total_to_save(self, own: Tensor) -> Tensor | None:
        """Such a statistic for a checkpoint, as `weight_to_save`. Collective."""
        return own

    def own_total(self, saved: Tensor) -> Tensor | None:
        """What this process is to start from of a saved one, so that the sum stays what it is. Collective."""
        return saved

    def share_of_sum(self, whole: Tensor, split: int) -> Tensor | None:
        """What this process is to hold of a statistic that all have whole, so that the sum stays what it is."""
        return whole

    def from_owner(self, owner: int, whole: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
        """What this process is to hold of a factor that its owner has, in the type of `like`. Collective."""
        if whole is None:
            raise RuntimeError("the owner of a factor must have it")
        return whole.to(like)

    def whole(self, part: Tensor, length: int, split: int = 0) -> Tensor:
        """All of a weight or factor, on every process; arguments as in `weight_at`. Collective."""
        return part

    def part(self, whole: Tensor, split: int = 0) -> Tensor:
        """What this process holds of a weight or factor."""
        return whole

    def weight_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        """A weight or factor for a checkpoint: whole at the process that saves, None at the others. Collective."""
        return part

    def sum_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        """A statistic for a checkpoint, as `weight_to_save`. Collective."""
        return part

    def over_rows(self, number: Tensor) -> Tensor:
        """A sum over the entries of a weight, from the sums over what each process holds of it. Collective."""
        return number


class Several(Team):
    """More than one process, in the default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = device

    @property
    @override
    def device(self) -> torch.device:
        return self._device

    @override
    def gathered(self, mine: T) -> list[T]:
        everyone: list[T | None] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone  # type: ignore[return-value]

    @override
    def decided(self, choose: Callable[[], T]) -> T:
        choice: list[T | None] = [None]
        with self.together():
            if self.rank == 0:
                choice = [choose()]
        dist.broadcast_object_list(choice, src=0, device=self._device)
        return choice[0]  # type: ignore[return-value]

    @override
    def total_at(self, owner: int, own: Tensor) -> Tensor | None:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.reduce(total, dst=owner)
        return total if self.rank == owner else None

    @override
    def own_total(self, saved: Tensor) -> Tensor | None:
        whole = saved.full_tensor() if isinstance(saved, DTensor) else saved
        return whole if self.rank == 0 else None

    @override
    @contextmanager
    def together(self) -> Iterator[None]:
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001  (it is raised again, after the others know)
            own = error
        messages = self.gathered(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message is not None:
                raise ProcessFailedError(f"process {rank} of {self.size} failed: {message}")


class Replicas(Several):
    """Processes with a whole model each, as under DDP."""

    @override
    def weight_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        return part if self.rank == owner else None

    @override
    def sum_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        return self.total_at(owner, part)

    @override
    def over_batches(self, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @override
    def weight_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        whole = self.weight_at(0, part, length, split)
        return None if whole is None else whole.cpu()

    @override
    def sum_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        return self.total_to_save(part)

    @override
    def total_to_save(self, own: Tensor) -> Tensor | None:
        total = self.total_at(0, own)
        return None if total is None else total.cpu()

    @override
    def share_of_sum(self, whole: Tensor, split: int) -> Tensor | None:
        return whole if self.rank == 0 else None

    @override
    def from_owner(self, owner: int, whole: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
        received = like.new_empty(tuple(shape)) if whole is None else whole.to(like).contiguous()
        dist.broadcast(received, src=owner)
        return received


class Shards(Several):
    """Processes with some rows of every weight each, as under FSDP.

    Rows are dealt out as `torch.chunk` does: equally many each, fewer or none to the last. Gradients come summed over
    the processes, in rows. Second moments are summed and cut into rows whenever a unit of the model has run, so that
    no process holds those of more than one unit and the ones around it.

    Args:
        device: of the weights.
        units: modules whose weights come together for a forward pass, outer ones before those within.
        mesh: of the processes, when checkpoints are saved in parts; otherwise the first process saves everything.
    """

    whole_everywhere = False

    def __init__(self, device: torch.device, units: Sequence[nn.Module], mesh: DeviceMesh | None) -> None:
        super().__init__(device)
        self.gradients_divided_by = self.size
        self._units = units
        self._mesh = mesh
        self._seen = Moments()

    @override
    @contextmanager
    def inputs(self, into: Moments, targets: Mapping[str, Target]) -> Iterator[Moments]:
        seen = self._seen = Moments(leaders=into.leaders)
        unit_of = {part: unit for unit in self._units for part in unit.modules()}
        numbers = {name: number for number, name in enumerate(targets)}
        with ExitStack() as hooks:
            for unit in self._units:
                inside = {name: number for name, number in numbers.items() if unit_of[targets[name].module] is unit}

                def absorb(*_: Any, inside: Mapping[str, int] = inside) -> None:
                    self._agree_on_leaders(inside, numbers, into.leaders)
                    for leader in inside:
                        if into.leaders.get(leader) == leader:
                            self._absorb(targets[leader], seen, into)

                hooks.callback(unit.register_forward_hook(absorb).remove)
            yield seen

    @override
    def inputs_seen(self) -> None:
        if self._seen.input_sums:
            raise CalibrationError(
                f"{', '.join(list(self._seen.input_sums)[:3])} ran outside the forward pass of the module that was "
                "given to fully_shard; call that module, or add them to ignore"
            )

    @override
    def weight_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        rows = self._padded(_turned(part, split), length)
        received = [torch.empty_like(rows) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(rows, received, dst=owner)
        return None if received is None else _turned(torch.cat(received)[:length], split)

    @override
    def sum_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        return self.weight_at(owner, part, length, split)

    @override
    def weight_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        if self._mesh is None:
            whole = self.weight_at(0, part, length, split)
            return None if whole is None else whole.cpu()
        shape = torch.Size(length if dimension == split else size for dimension, size in enumerate(part.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part.contiguous(), self._mesh, [Shard(split)], shape=shape, stride=stride)

    @override
    def sum_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        return self.weight_to_save(part, length, split)

    @override
    def total_to_save(self, own: Tensor) -> Tensor | None:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return self.weight_to_save(self.part(total), len(total))

    @override
    def share_of_sum(self, whole: Tensor, split: int) -> Tensor | None:
        return self.part(whole, split)

    @override
    def from_owner(self, owner: int, whole: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
        length, *others = shape
        received = like.new_empty((self._share(length), *others))
        shares = None
        if whole is not None:
            shares = [self._padded(self._rows_of(whole.to(like), rank), length) for rank in range(self.size)]
        dist.scatter(received, shares, src=owner)
        return self._unpadded(received, length)

    @override
    def whole(self, part: Tensor, length: int, split: int = 0) -> Tensor:
        rows = self._padded(_turned(part, split), length)
        everything = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        _all_gather(everything, rows)
        return _turned(everything[:length], split)

    @override
    def part(self, whole: Tensor, split: int = 0) -> Tensor:
        if isinstance(whole, DTensor):
            return whole.to_local()
        return _turned(self._rows_of(_turned(whole, split), self.rank), split)

    @override
    def over_rows(self, number: Tensor) -> Tensor:
        total = number.clone()
        dist.all_reduce(total)
        return total

    def _share(self, length: int) -> int:
        return math.ceil(length / self.size)

    def _rows_of(self, whole: Tensor, rank: int) -> Tensor:
        share = self._share(len(whole))
        return whole[rank * share : (rank + 1) * share]

    def _padded(self, rows: Tensor, length: int) -> Tensor:
        padded = rows.new_zeros((self._share(length), *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded

    def _unpadded(self, rows: Tensor, length: int) -> Tensor:
        return rows[: max(0, min(len(rows), length - self.rank * len(rows)))]

    def _absorb(self, target: Target, seen: Moments, into: Moments) -> None:
        """Sums the second moment of one input over all processes, and keeps this one's rows of it."""
        leader, width = target.name, target.shape[1]
        own = seen.input_sums.pop(leader, None)
        dtype = accumulated(target.module.weight.dtype)
        padded = torch.zeros(self._share(width) * self.size, width, dtype=dtype, device=self._device)
        if own is not None:
            padded[:width] = own
        rows = padded.new_empty((self._share(width), width))
        _reduce_scatter(rows, padded)
        rows = self._unpadded(rows, width)
        into.input_sums[leader] = rows if leader not in into.input_sums else into.input_sums[leader] + rows
        into.tokens[leader] = into.tokens.get(leader, 0) + seen.tokens.pop(leader, 0)

    def _agree_on_leaders(self, inside: Mapping[str, int], numbers: Mapping[str, int], leaders: dict[str, str]) -> None:
        """Tells every process of layers that have run on another only, and whose input they read."""
        names, unknown = list(numbers), -len(numbers)
        mine = [numbers[leaders[name]] if name in leaders else unknown for name in inside]
        others = [-number if number != unknown else unknown for number in mine]
        known = torch.tensor([mine, others], device=self._device)
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
        for name, highest, lowest in zip(inside, *known.tolist(), strict=True):
            if highest not in (unknown, -lowest):
                raise not_shared_alike(name, names[highest], names[-lowest])
            if highest != unknown:
                leaders[name] = names[highest]


def _turned(matrix: Tensor, split: int) -> Tensor:
    """The same with the dimension that is cut in front, and back."""
    return matrix if split == 0 else matrix.T
