"""Team whose processes each hold some rows of every weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.distributed.replicas import Several
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments, not_shared_alike

# torch 2.13 renamed these functions
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shards(Several):
    """Team whose processes each hold some rows of every weight, as under FSDP.

    Rows are split as in `torch.chunk`: equal shares, with fewer or no rows for the last processes. Each process
    receives its rows of the gradients, summed over the processes. Second moments are summed and split into rows each
    time a unit of the model has run. No process therefore holds the second moments of more than one unit and the
    units around it.

    Args:
        device: device of the weights.
        units: modules whose weights are gathered together for a forward pass, outer modules before inner ones.
        mesh: mesh of the processes if checkpoints are saved in parts; None if the first process saves everything.
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
        """Sum the second moment of one input over all processes, and add this process's rows of it to `into`."""
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
        """Share the leaders of layers with processes on which those layers have not run."""
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
    """Move the dimension that is split to the front, or back from there."""
    return matrix if split == 0 else matrix.T
