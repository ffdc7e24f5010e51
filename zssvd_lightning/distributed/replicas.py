"""Teams of several processes, and the team whose processes each hold every weight whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from zssvd_lightning.distributed.team import Team
from zssvd_lightning.errors import ProcessFailedError

T = TypeVar("T")


class Several(Team):
    """Team of several processes, in the default process group."""

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
    def decide_on_first(self, choose: Callable[[], T]) -> T:
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
        except Exception as error:  # noqa: BLE001  (raised again once the other processes know)
            own = error
        messages = self.gathered(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message is not None:
                raise ProcessFailedError(f"process {rank} of {self.size} failed: {message}")


class Replicas(Several):
    """Team whose processes each hold the whole model, as under DDP."""

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
