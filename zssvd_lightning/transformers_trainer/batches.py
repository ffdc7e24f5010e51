"""Batches of a training run, read a second time without changing what the run sees of its data."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from zssvd_lightning._contexts import same_random_numbers
from zssvd_lightning.calibration.contexts import unchanged_sampler
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import UnsupportedTrainingError


class TrainingBatches:
    """Batches of a DataLoader, in an order of their own. Every pass gives the same order.

    The passes leave the DataLoader, its workers, its sampler and the random number generators as they were. They load
    in this process: workers that are kept between epochs can serve one pass at a time.

    Under DDP they are those of this process, as in training.

    Args:
        loader: the DataLoader of a training run, which may be in the middle of a pass.
        team: the processes of the run.

    Raises:
        UnsupportedTrainingError: the data cannot be read twice.
    """

    def __init__(self, loader: Any, team: Team | None = None) -> None:
        from accelerate.data_loader import DataLoaderDispatcher  # which the Trainer needs, but not this package

        plain = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        if not isinstance(plain, DataLoader):
            raise UnsupportedTrainingError(
                f"the training data comes from a {type(plain).__name__}, not from a DataLoader of torch; pass "
                "calibration batches: ZSSVDTrainerCallback(batches=...)"
            )
        if isinstance(plain.dataset, IterableDataset) and isinstance(plain.dataset, Iterator):
            raise UnsupportedTrainingError(
                f"{type(plain.dataset).__name__} can be read only once, and calibration needs batches of its own; pass "
                "them: ZSSVDTrainerCallback(batches=...)"
            )
        self._loader = plain
        self._first, self._step = 0, 1
        if team is not None and isinstance(loader, DataLoaderDispatcher):  # the first process reads for all
            self._first, self._step = team.rank, team.size

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one pass."""
        with same_random_numbers(), unchanged_sampler(self._loader):
            yield from islice(self._second_loader(), self._first, None, self._step)

    def __len__(self) -> int:
        """Return the number of batches. Raises TypeError for an IterableDataset without a length."""
        return len(range(self._first, len(self._loader), self._step))

    def _second_loader(self) -> DataLoader[Any]:
        given = self._loader
        if isinstance(given.dataset, IterableDataset):
            drawn: dict[str, Any] = {"batch_size": given.batch_size, "drop_last": given.drop_last}
        elif given.batch_sampler is None:
            drawn = {"batch_size": None, "sampler": given.sampler}
        else:
            drawn = {"batch_sampler": given.batch_sampler}
        return DataLoader(given.dataset, collate_fn=given.collate_fn, **drawn)
