"""What the processes of a compression say to each other: one process on its own, and the pattern for several."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments

T = TypeVar("T")


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

    def decide_on_first(self, choose: Callable[[], T]) -> T:
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
