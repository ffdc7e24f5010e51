from dataclasses import asdict

import pytest

from zssvd_lightning import CompressionConfig
from zssvd_lightning.compression.snapshot import refuse_other
from zssvd_lightning.errors import CheckpointError


def test_a_checkpoint_from_before_rank_multiples_goes_on_with_any_rank():
    saved = asdict(CompressionConfig(0.3, selection="sigma"))
    del saved["rank_multiple"]
    refuse_other({"config": saved}, CompressionConfig(0.3, selection="sigma", rank_multiple=1))
    with pytest.raises(CheckpointError, match=r"other settings \(rank_multiple was 1 and is 8\)"):
        refuse_other({"config": saved}, CompressionConfig(0.3, selection="sigma"))
