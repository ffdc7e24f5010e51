"""Compressions that differ by rounding, as those of two devices do."""

import copy
from functools import cache

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.config.presets import PRESETS, settings_of

ROUNDING = 1e-7
BATCHES = token_batches(3, size=2, length=12)


@cache
def trained():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(12):
        optimizer.zero_grad()
        model(**BATCHES[step % len(BATCHES)]).loss.backward()
        optimizer.step()
    return model.eval()


def disturbed(model):
    for parameter in model.parameters():
        parameter.data.mul_(1 + ROUNDING * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_rounding_changes_no_rank_and_logits_by_rounding(preset):
    settings = settings_of(preset)
    settings |= {"corrections": min(settings["corrections"], 1), "correction_batches": 2}
    found = []
    for model in (copy.deepcopy(trained()), disturbed(copy.deepcopy(trained()))):
        report = compress(model, BATCHES, CompressionConfig(0.4, **settings), progress=False)
        with torch.no_grad():
            logits = model(BATCHES[0]["input_ids"]).logits
        found.append(({name: layer.rank for name, layer in report.layers.items()}, logits))
    (ranks, logits), (other_ranks, other_logits) = found
    assert other_ranks == ranks
    torch.testing.assert_close(other_logits, logits, atol=2e-4, rtol=0)
