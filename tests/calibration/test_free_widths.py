"""Hidden widths whose order is free: what is found, what is not, and that looking leaves no traces."""

import pytest
import torch
from support.models import FAMILIES, assert_same_state, state_of, tiny_llama, token_batches
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, LlamaConfig

from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.free_widths import FreeWidths, Width, free_in_all
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.model.targets import find_targets


def found_in(model, batch, layers=None, run=None, **chosen):
    """Widths that are free by one batch."""
    targets = LayerSet(layers or find_targets(model, **chosen))
    statistics = StatisticsCollector(model, targets)
    statistics.free_widths = FreeWidths()
    with statistics.observing(TokenMask(None)) as observation:
        (run or (lambda: model(**batch) if isinstance(batch, dict) else model(batch)))()
        observation.forward_done()
    assert statistics.free_widths.verdicts or run or chosen
    return free_in_all([statistics.free_widths.state_dict()])


EXPECTED = {
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 2),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj", 2),
    "bert": (("intermediate.dense",), "output.dense", 2),
    "t5": (("DenseReluDense.wi",), "DenseReluDense.wo", 4),
    "vit": (("intermediate.dense",), "output.dense", 2),
}
"""Ends of the names of the producers and the consumer, and how many such widths there are."""
