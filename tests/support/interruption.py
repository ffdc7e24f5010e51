"""A compression saved in the middle of its second step, and gone on with by another."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from support.models import tiny_llama
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.snapshot import state_of, take_up
from zssvd_lightning.config.compression import CompressionConfig


def interrupted(config: CompressionConfig, batches: Sequence[Any], statistics: bool) -> Compression:
    """The one that went on from what was saved, once it is the same as the one that was not interrupted.

    Args:
        config: with two steps or more, of which two are taken.
        batches: of every step.
        statistics: whether what was gathered for the second step is saved too, or gathered once more.
    """
    first, second, *_ = course(config)
    model = tiny_llama()
    whole = Compression(model, config, progress=False)
    gather(whole, batches, first.gathers)
    whole.take(first)
    weights = copy.deepcopy(model.state_dict())
    gather(whole, batches, second.gathers)
    state = copy.deepcopy(state_of(whole, statistics=statistics))
    whole.take(second)

    model = tiny_llama()
    model.load_state_dict(weights)
    resumed = Compression(model, config, progress=False)
    take_up(resumed, state)
    if not statistics:
        gather(resumed, batches, second.gathers)
    resumed.take(second)
    assert resumed.losses == whole.losses
    assert resumed.report().layers == whole.report().layers
    for name, target in resumed.targets.items():
        assert torch.equal(target.weight, whole.targets[name].weight)
    return resumed
