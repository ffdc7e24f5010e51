"""Storage `down_in_8_bits`: the factor that reads the input in 8 bits, the one that writes the output in 16.

A component costs `m + n / 2` numbers, so that more of them stay than with two factors in 16 bits.
"""

import torch

from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.storage import Kept, Storage
from zssvd_lightning.selection.storages import STORAGES


def kept(m, n, k):
    """Count `up` in 16 bits, `down` in 8 bits, and the scale of each component in bfloat16."""
    return Kept(wide=k * m, codes=k * n, beside=2 * k, products=k * (m + n))


def rounded(layer):
    """Round the columns of `down`, and no row of `up`."""
    rows = torch.ones(layer.out_features, dtype=torch.bool)
    columns = torch.zeros(layer.in_features, dtype=torch.bool)
    return Int8LowRankLinear.of(layer, rows, columns)


STORAGES.register("down_in_8_bits", Storage(kept, rounded=rounded))
