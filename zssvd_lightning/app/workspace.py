"""Calibration windows of a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from zssvd_lightning.app.run_config import CalibrationConfig
from zssvd_lightning.sources.texts import Tokens, sampled_windows


def calibration_windows(config: CalibrationConfig, tokens_of: Callable[[str], Tokens]) -> Tensor:
    """Return the windows (samples + correction_samples, length) of a calibration, alternating between two texts.

    Args:
        config: number and length of the windows, seed, and one or two texts.
        tokens_of: function that returns the tokens of a text source.

    Raises:
        TextError: a text cannot be read or is too short.
    """
    sources = [source for source in (config.text, config.second) if source is not None]
    total, every = config.samples + config.correction_samples, len(sources)
    counts = [len(range(turn, total, every)) for turn in range(every)]
    parts = [
        sampled_windows(tokens_of(source), config.length, count, config.seed, source)
        for source, count in zip(sources, counts, strict=True)
    ]
    drawn = torch.empty(total, config.length, dtype=torch.long)
    for turn, part in enumerate(parts):
        drawn[turn::every] = part
    return drawn
