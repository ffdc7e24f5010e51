"""Weights that are mapped from files, and change in a scratch file."""

import copy
import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import assert_same_state, padded_batches, state_of, tiny_llama

from zssvd_lightning import compress
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.decomposition.originals import Originals
from zssvd_lightning.errors import OutputError
from zssvd_lightning.offload import mapped_weights, media
from zssvd_lightning.offload.mapped_weights import WeightFile, mapped_from_files
from zssvd_lightning.offload.pages import release_pages

pytestmark = pytest.mark.skipif(not Path(mapped_weights.MAPS).exists(), reason="the system does not list mappings")

SETTINGS = {"prune_ratio": 0.3, "memory": "blocks", "progress": False}


def mapped(model, folder):
    """The same model with its weights mapped from a file of safetensors, and the bytes of that file."""
    other = copy.deepcopy(model)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    other.load_state_dict(load_file(folder / "weights.safetensors"), assign=True)
    return other, (folder / "weights.safetensors").read_bytes()


def test_mapped_tensors_are_told_from_those_in_memory(tmp_path):
    save_file({"a": torch.randn(300, 300), "b": torch.randn(7)}, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    others = {"memory": torch.randn(300, 300), "transposed": found["a"].T, "empty": torch.empty(0)}
    assert mapped_from_files(found | others | {"meta": torch.empty(9, device="meta")}) == ["a", "b"]


def test_mapped_tensors_are_not_known_without_a_list(tmp_path, monkeypatch):
    save_file({"a": torch.randn(300, 300)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(mapped_weights, "MAPS", str(tmp_path / "none"))
    assert mapped_from_files(load_file(tmp_path / "weights.safetensors")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_file_returns_what_was_put_last(dtype):
    torch.manual_seed(0)
    weights = {name: torch.randn(33, 65).to(dtype) for name in "abc"}
    file = WeightFile(weights)
    first = {name: file.put(name, weight) for name, weight in weights.items()}
    assert all(torch.equal(first[name], weight) for name, weight in weights.items())
    first["b"].mul_(3)  # written in memory, without the file
    assert release_pages(first.values()) > 0
    assert torch.equal(first["b"], weights["b"] * 3)
    again = file.put("b", weights["b"] + 1)
    assert torch.equal(again, weights["b"] + 1)
    assert torch.equal(first["b"], again)
    assert torch.equal(file.put("b", again * 2), (weights["b"] + 1) * 2)
    assert torch.equal(first["a"], weights["a"])
    assert torch.equal(first["c"], weights["c"])


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "best", "corrections": 0},
        {"preset": "best", "corrections": 2, "correction_batches": 1},
        {"preset": "zs-svd-line-search", "corrections": 1, "correction_batches": 1},
    ],
    ids=lambda settings: str(settings["preset"]) + str(settings["corrections"]),
)
def test_a_mapped_model_ends_as_one_in_memory_and_its_file_stays(settings, tmp_path):
    torch.manual_seed(0)
    model = tiny_llama()
    other, content = mapped(model, tmp_path)
    reports = [compress(each, padded_batches(4), **SETTINGS, **settings) for each in (model, other)]
    assert dict(reports[0].layers) == dict(reports[1].layers)
    assert reports[0].losses == reports[1].losses
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert (tmp_path / "weights.safetensors").read_bytes() == content


def test_a_failed_run_leaves_the_very_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, content = mapped(tiny_llama(), tmp_path)
    before, places = state_of(model), [p.data_ptr() for p in model.parameters()]

    def fail(self, *args, **kwargs):
        assert [p.data_ptr() for p in model.parameters()] != places
        raise KeyboardInterrupt

    monkeypatch.setattr(Compression, "factorize", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(model, padded_batches(2), **SETTINGS, corrections=0)
    assert_same_state(before, state_of(model))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert (tmp_path / "weights.safetensors").read_bytes() == content


def test_truncation_copies_no_mapped_weight(tmp_path, monkeypatch):
    """Neither the original weight nor the truncated one is in memory of this process."""
    torch.manual_seed(0)
    model, _ = mapped(tiny_llama(), tmp_path)
    seen = []
    keep = Originals.keep

    def kept(self, names=None):
        keep(self, names)
        seen.append((dict(self._held), self.copies))

    monkeypatch.setattr(Originals, "keep", kept)
    compress(model, padded_batches(2), **SETTINGS, corrections=0)
    assert seen
    assert all(not held and copies for held, copies in seen)


def test_a_full_disk_leaves_the_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, _ = mapped(tiny_llama(), tmp_path)
    before = state_of(model)

    def full(self, start, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_at(self, start, content):
        with self._explained(content.nbytes):
            full(self, start, content)

    monkeypatch.setattr(media.ScratchFile, "write_at", write_at)
    with pytest.raises(OutputError, match="more to scratch files"):
        compress(model, padded_batches(2), **SETTINGS, corrections=0)
    assert_same_state(before, state_of(model))
