"""Settings of memory, and their sizes."""

import pytest

from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.config.placement import bytes_of
from zssvd_lightning.errors import ConfigError, ContradictionError


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("24GiB", 24 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        ("2tb", 2 * 10**12),
        ("10B", 10),
        ("1000", 1000),
        (1000, 1000),
    ],
)
def test_sizes(size, number):
    assert bytes_of(size, "max_memory") == number
    assert CompressionConfig(max_memory=size).limits == {"max_memory": size}


@pytest.mark.parametrize("size", ["", "GiB", "24 gigs", "-1GiB", "1e9", 0, -5, "0.1B", 2.5, True])
def test_what_is_no_size_is_refused(size):
    for name in ("max_memory", "max_host_memory"):
        with pytest.raises(ConfigError, match=name):
            CompressionConfig(**{name: size})


def test_sizes_in_yaml_and_overrides(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("max_memory: 24GiB\nmax_host_memory: 1000000\n")
    assert load_config(CompressionConfig, file).limits == {"max_memory": "24GiB", "max_host_memory": 1000000}
    assert load_config(CompressionConfig, file, ["max_memory=500MB"]).max_memory == "500MB"


def test_auto_is_the_whole_model_and_no_offload_without_limits():
    config = CompressionConfig()
    assert (config.memory, config.offload, config.place, config.by_blocks) == ("auto", "auto", "none", False)
    assert CompressionConfig(memory="blocks").place == "disk"


def test_blocks_exclude_other_places_and_refits():
    with pytest.raises(ContradictionError, match="offload cannot be 'cpu'"):
        CompressionConfig(memory="blocks", offload="cpu")
    with pytest.raises(ContradictionError, match="memory cannot be 'blocks'"):
        CompressionConfig(memory="blocks", correction_step="refit", corrections=1)
