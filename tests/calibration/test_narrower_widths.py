"""Hidden widths that can have fewer units, and networks whose order of units is free but not their number."""

import pytest
import torch
from support.models import FAMILIES, assert_same_state, state_of
from torch import nn
from torch.nn.functional import layer_norm

from zssvd_lightning.calibration.widths.trials import Width, can_be_narrower, is_free
from zssvd_lightning.model.targets import Target, find_targets

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 12), nn.Linear(12, 7), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def verdicts(between):
    torch.manual_seed(0)
    block = Block(between).eval()
    targets = {name: Target(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    before = state_of(block)
    width = Width(("first",), "second")
    found = tuple(trial(block, width, targets, (X,), {}) for trial in (is_free, can_be_narrower))
    assert_same_state(before, state_of(block))
    return found


@pytest.mark.parametrize("between", [nn.GELU(), nn.ReLU(), lambda h: h * h, lambda h: h.clamp(-1, 1)])
def test_units_that_do_not_meet_can_be_removed(between):
    assert verdicts(between) == (True, True)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: layer_norm(h, h.shape[-1:]),  # a mean over all units
        lambda h: h.softmax(-1),
        lambda h: h / h.shape[-1],  # their number
        lambda h: h.relu().reshape(*h.shape[:-1], 12),
    ],
)
def test_an_order_may_be_free_where_the_number_of_units_is_not(between):
    assert verdicts(between) == (True, False)


def test_a_norm_with_weights_has_no_free_order_and_no_other_number():
    assert verdicts(nn.LayerNorm(12)) == (False, False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_keep_their_sizes_are_as_before(family):
    """Conv1D reshapes its outputs by an attribute, which is put back."""
    model = FAMILIES[family].build().eval()
    targets, before = find_targets(model), state_of(model)
    if family == "llama":
        block, start = model.model.layers[0].mlp, "model.layers.0.mlp."
        width = Width((f"{start}gate_proj", f"{start}up_proj"), f"{start}down_proj")
    else:
        block, start = model.transformer.h[0].mlp, "transformer.h.0.mlp."
        width = Width((f"{start}c_fc",), f"{start}c_proj")
    assert can_be_narrower(block, width, targets, (torch.randn(2, 3, 32),), {})
    assert_same_state(before, state_of(model))
