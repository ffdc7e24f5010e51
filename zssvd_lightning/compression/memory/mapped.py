"""Targets whose weights are mapped from files, which a compression block by block changes in a scratch file."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import nn

from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.model.targets import Target, find_targets
from zssvd_lightning.offload.mapped_weights import WeightFile, mapped_from_files
from zssvd_lightning.offload.pages import released_behind


def targets_of(model: nn.Module, config: CompressionConfig) -> dict[str, Target]:
    """Return the target layers of a compression, by name in module order.

    With `memory: blocks`, weights that are mapped from files get a `WeightFile`. Errors as in `find_targets`.
    """
    targets = find_targets(model, config.include, config.ignore, config.opted)
    if not config.by_blocks:
        return targets
    weights = {name: target.module.weight for name, target in targets.items()}
    mapped = mapped_from_files(weights)
    file = WeightFile({name: weights[name] for name in mapped})
    return targets | {name: replace(targets[name], file=file) for name in mapped}


def little_resident(model: nn.Module, config: CompressionConfig) -> AbstractContextManager[None]:
    """Return a context in which mapped weights of a model that runs block by block are resident while they run."""
    return released_behind(model) if config.by_blocks else nullcontext()
