"""Windows of a run: for calibration, for training, and those that judge the training."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zssvd_lightning.app.run_config import CalibrationConfig, TrainingConfig
from zssvd_lightning.sources.texts import Tokens, hold_out, sampled_windows


def calibration_windows(config: CalibrationConfig, tokens_of: Callable[[str], Tokens]) -> Tensor:
    """Return the windows (samples + correction_samples, length) of a calibration, alternating between two texts.

    Args:
        config: number and length of the windows, seed, and one or two texts.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    sources = [source for source in (config.text, config.second) if source is not None]
    return alternating_windows(
        sources, config.length, config.samples + config.correction_samples, config.seed, tokens_of
    )


def training_windows(config: TrainingConfig, sources: Sequence[str], tokens_of: Callable[[str], Tokens]) -> Tensor:
    """Return all windows (N, length) that training goes through, in random order, equally many of each text.

    Args:
        config: length of the windows and seed.
        sources: one or two texts.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    each = min(len(sampled_windows(tokens_of(source), config.length, 0, config.seed, source)) for source in sources)
    return alternating_windows(sources, config.length, each * len(sources), config.seed, tokens_of)


def alternating_windows(
    sources: Sequence[str], length: int, total: int, seed: int, tokens_of: Callable[[str], Tokens]
) -> Tensor:
    """Return windows (total, length) drawn at random, which alternate between the texts.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    every = len(sources)
    counts = [len(range(turn, total, every)) for turn in range(every)]
    parts = [
        sampled_windows(tokens_of(source), length, count, seed, source)
        for source, count in zip(sources, counts, strict=True)
    ]
    drawn = torch.empty(total, length, dtype=torch.long)
    for turn, part in enumerate(parts):
        drawn[turn::every] = part
    return drawn


class HeldOut:
    """Texts of which some windows are kept back from calibration and training, to judge the training.

    Args:
        sources: one or two texts to train on; each gives an equal share of the windows.
        config: length of the windows, their number and seed.
        tokens_of: function that returns the tokens of a text source.

    Attributes:
        windows: the windows (N, length) kept back. At most every tenth window of a text is, and at least one.

    Raises:
        TextError: a text cannot be read, or has fewer than two windows.
    """

    def __init__(self, sources: Sequence[str], config: TrainingConfig, tokens_of: Callable[[str], Tokens]) -> None:
        self._tokens_of, self._rest, parts = tokens_of, {}, []
        for source in sources:
            share = -(-config.held_out // len(sources))
            held, self._rest[source] = hold_out(tokens_of(source), config.length, share, config.seed, source)
            parts.append(held)
        self.windows = torch.cat(parts)

    def tokens_of(self, source: str) -> Tokens:
        """Return the tokens of a text source without the windows kept back."""
        return self._rest[source] if source in self._rest else self._tokens_of(source)
