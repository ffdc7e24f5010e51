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
    drawn = torch.empty(config.samples + config.correction_samples, config.length, dtype=torch.long)
    for turn, source in enumerate(sources):
        places = drawn[turn :: len(sources)]
        places.copy_(sampled_windows(tokens_of(source), config.length, len(places), config.seed, source))
    return drawn
