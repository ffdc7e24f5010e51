import io

import pytest
import torch
from torch import nn

from zssvd_lightning import LowRankLinear
from zssvd_lightning.layers.int8 import Int8Linear, Int8LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

UP, DOWN, BIAS = torch.randn(6, 2), torch.randn(2, 8), torch.randn(6)


def int8(rows, columns):
    return Int8LowRankLinear.of(LowRankLinear.from_factors(UP, DOWN, BIAS), rows, columns)


LAYERS = {
    "low-rank": lambda: LowRankLinear.from_factors(UP, DOWN, BIAS),
    "low-rank without bias": lambda: LowRankLinear.from_factors(UP, DOWN, None),
    "pivoted": lambda: PivotedLinear.from_factors(UP, DOWN, BIAS),
    "pivoted, all rows": lambda: PivotedLinear.from_factors(torch.randn(3, 3), torch.randn(3, 8), None),
    "pivoted, no order": lambda: PivotedLinear.from_factors(UP, DOWN, BIAS, torch.arange(6)),
    "columns": lambda: ColumnPivotedLinear.from_factors(UP, DOWN, BIAS),
    "columns, all columns": lambda: ColumnPivotedLinear.from_factors(torch.randn(9, 8), torch.randn(8, 8), None),
    "columns, no order": lambda: ColumnPivotedLinear.from_factors(UP, DOWN, BIAS, torch.arange(8)),
    "8 bits": lambda: Int8Linear.of(nn.Linear(8, 6)),
    "8 bits, low-rank": lambda: int8(torch.arange(6) < 0, torch.arange(8) < 0),
    "8 bits, last rows in 16": lambda: int8(torch.arange(6) > 4, torch.arange(8) < 0),
    "8 bits, other rows and columns in 16": lambda: int8(torch.arange(6) == 2, torch.arange(8) == 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_scripted_saved_and_loaded_as_torchscript(name):
    model = nn.Sequential(LAYERS[name](), nn.Tanh())
    x, file = torch.randn(2, 3, 8), io.BytesIO()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_no_fault_until_a_value_is_changed(name):
    layer = LAYERS[name]()
    assert layer.fault() is None
    assert layer.to("meta").fault() is None


def test_faults_are_told_by_the_name_of_the_value():
    layer = LAYERS["pivoted"]()
    layer.order[0] = layer.order[1]
    assert layer.fault() == "order is no permutation of 0 to 5"
    layer = LAYERS["low-rank"]()
    layer.up.weight.data[1, 1] = torch.inf
    assert layer.fault() == "up.weight has values that are NaN or infinite"
