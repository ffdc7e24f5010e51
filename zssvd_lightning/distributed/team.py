"""Communication between the processes of a compression: one process, and the interface for several."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments

T = TypeVar("T")


class Team:
    """Team of a single process, and the interface for teams of several.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        gradients_divided_by: number by which training divides the sum of all processes' gradients.
        whole_everywhere: whether every process holds every weight whole.
    """

    rank = 0
    size = 1
    gradients_divided_by = 1
    whole_everywhere = True

    @property
    def device(self) -> torch.device:
        """Device on which tensors must be to be sent."""
        return torch.device("cpu")

    def gathered(self, mine: T) -> list[T]:
        """Return the value of every process, in order of rank. Collective."""
        return [mine]

    def decide_on_first(self, choose: Callable[[], T]) -> T:
        """Call `choose` on the first process only and return its result on all. Collective."""
        return choose()

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which an error on one process ends the block on all. Collective.

        A process with an error raises that error, which may differ between processes.

        Raises:
            ProcessFailedError: on a process without an error, when another process has one.
        """
        return nullcontext()

    def inputs(self, into: Moments, targets: Mapping[str, Target]) -> AbstractContextManager[Moments]:
        """Return a context that yields the moments to which a batch adds its second moments of the inputs.

        From there they are added to `into`.

        Args:
            into: the statistics of the calibration.
            targets: the layers that are watched, by name.
        """
        return nullcontext(into)

    def inputs_seen(self) -> None:
        """Check, after a forward pass, that all inputs were added to the statistics.

        Raises:
            CalibrationError: some were not.
        """

    def weight_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        """Return a whole weight on its owner, None on other processes. Collective.

        Args:
            owner: rank of the process that needs the weight.
            part: this process's part of the weight.
            length: size of the whole weight along `split`.
            split: dimension along which the weight is split into shards.
        """
        return part

    def sum_at(self, owner: int, part: Tensor, length: int, split: int) -> Tensor | None:
        """Return a statistic over all batches on its owner, None on other processes. Collective.

        Args:
            owner: rank of the process that needs the statistic.
            part: this process's part of the statistic.
            length: size of the whole statistic along `split`.
            split: dimension along which the statistic is split into shards.
        """
        return part

    def over_batches(self, part: Tensor) -> Tensor:
        """Return this process's part of a statistic, over the batches of all processes. Collective."""
        return part

    def total_at(self, owner: int, own: Tensor) -> Tensor | None:
        """Sum a per-process statistic onto `owner`; return None elsewhere. Collective.

        Args:
            owner: rank of the process that needs the sum.
            own: the whole statistic, over the batches of this process.
        """
        return own

    def total_to_save(self, own: Tensor) -> Tensor | None:
        """Sum a per-process statistic for a checkpoint; return it in the form of `weight_to_save`. Collective."""
        return own

    def own_total(self, saved: Tensor) -> Tensor | None:
        """Return the value from which this process continues a saved per-process statistic. Collective.

        The sum over the processes is unchanged. None means that this process starts from nothing.
        """
        return saved

    def share_of_sum(self, whole: Tensor, split: int) -> Tensor | None:
        """Return this process's share of a statistic that every process has whole; None for no share.

        The sum over the processes is unchanged.
        """
        return whole

    def from_owner(self, owner: int, whole: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
        """Send a factor from its owner and return this process's part of it. Collective.

        Args:
            owner: rank of the process that has the factor.
            whole: the whole factor on its owner, None on other processes.
            shape: shape of the whole factor.
            like: tensor whose type and device the result gets.
        """
        if whole is None:
            raise RuntimeError("the owner of a factor must have it")
        return whole.to(like)

    def whole(self, part: Tensor, length: int, split: int = 0) -> Tensor:
        """Return a whole weight or factor on every process; arguments as in `weight_at`. Collective."""
        return part

    def part(self, whole: Tensor, split: int = 0) -> Tensor:
        """Return this process's part of a whole weight or factor."""
        return whole

    def weight_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        """Return a weight or factor for a checkpoint. Collective.

        The process that saves gets it whole, the others None. Where checkpoints are saved in parts, every process gets
        a DTensor instead.
        """
        return part

    def sum_to_save(self, part: Tensor, length: int, split: int = 0) -> Tensor | None:
        """Return a statistic for a checkpoint, in the form of `weight_to_save`. Collective."""
        return part

    def over_rows(self, number: Tensor) -> Tensor:
        """Return a sum over all entries of a weight, given the sum over this process's part of it. Collective."""
        return number
