"""Mappings of tensors in host memory and in scratch files."""

import copy
import errno
import gc
import tempfile

import pytest
import torch
from support.media import OfAnAccelerator

from zssvd_lightning.decomposition.factors import Factors
from zssvd_lightning.errors import OutputError
from zssvd_lightning.offload.media import ScratchFile
from zssvd_lightning.offload.stores import OFFLOADS, Offloading
from zssvd_lightning.whitening.spectrum import Spectrum

STORES = {"cpu": OFFLOADS["cpu"](), "copies": Offloading(OfAnAccelerator), "disk": OFFLOADS["disk"]()}

TENSORS = [
    torch.randn(3, 4),
    torch.randn(3, 4, dtype=torch.float64).T,
    torch.randn(2, 3, 4).to(torch.bfloat16)[:, 1:],
    torch.rand(2, 1, 3) > 0.5,
    torch.tensor(7),
    torch.empty(0, 5),
    torch.ones(1, 3).expand(4, 3),
    torch.randn(40, 50, requires_grad=True),
]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}")
def test_what_is_read_is_what_was_stored(store, tensor):
    held = STORES[store].tensors()
    held["before"], held["x"], held["after"] = torch.ones(3), tensor, torch.zeros(5)
    assert torch.equal(held["x"], tensor)
    assert held["x"].dtype == tensor.dtype
    assert held["x"].device == tensor.device
    assert not held["x"].requires_grad
    assert torch.equal(held["after"], torch.zeros(5))
    transposed = tensor.dim() == 2 and tensor.T.is_contiguous() and not tensor.is_contiguous()
    assert not transposed or held["x"].stride() == tensor.stride()
    assert held["x"].data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("store", STORES)
def test_values_of_several_tensors(store):
    factors, spectra = STORES[store].tuples(Factors), STORES[store].tuples(Spectrum)
    factors["a"] = Factors(torch.ones(2, 1), torch.zeros(1, 3))
    spectra["a"] = Spectrum(torch.ones(2, 2), torch.arange(2.0), torch.zeros(2, 3))
    assert isinstance(factors["a"], Factors)
    assert torch.equal(factors["a"].down, torch.zeros(1, 3))
    assert torch.equal(spectra["a"].sigma, torch.arange(2.0))


@pytest.mark.parametrize("store", STORES)
def test_a_sum_grows_by_storing_it_again(store):
    held, total = STORES[store].tensors(), torch.zeros(30, 40)
    held["x"], held["y"] = torch.zeros(30, 40), torch.ones(2)
    for step in range(5):
        added = torch.full((30, 40), float(step))
        value = held["x"]
        held["x"] = value.add_(added)
        total += added
    assert torch.equal(held["x"], total)
    assert torch.equal(held["y"], torch.ones(2))


@pytest.mark.parametrize("store", ["copies", "disk"])
def test_a_change_that_is_not_stored_is_not_kept(store):
    held = STORES[store].tensors()
    held["x"] = torch.ones(3)
    held["x"].add_(1.0)
    assert torch.equal(held["x"], torch.ones(3))


@pytest.mark.parametrize("store", STORES)
def test_a_copy_can_differ_and_outlives_the_original(store):
    first = STORES[store].tensors()
    first["x"], first["y"] = torch.ones(2), torch.zeros(2)
    second = copy.copy(first)
    second["x"] = torch.full((2,), 5.0)
    first["y"] = torch.full((2,), 7.0)
    assert torch.equal(first["x"], torch.ones(2))
    assert torch.equal(second["y"], torch.zeros(2))
    del second["y"]
    assert list(first) == ["x", "y"]
    first.clear()
    del first
    assert torch.equal(second["x"], torch.full((2,), 5.0))


def test_space_is_used_again():
    file, other = ScratchFile(), OfAnAccelerator()
    place = file.put(torch.ones(5, 6), None)
    assert file.put(torch.zeros(6, 5), place).start == place.start
    assert file.put(torch.zeros(6, 6), place).start > place.start
    held = other.put(torch.ones(5, 6), None)
    assert other.put(torch.zeros(5, 6), held).tensor.data_ptr() == held.tensor.data_ptr()


def test_clearing_frees_the_space_and_not_what_was_read():
    mapping = Offloading(ScratchFile).tensors()
    for value in (1.0, 2.0, 3.0):
        mapping["a"] = torch.full((64, 64), value)
        read = mapping["a"]
        assert mapping._medium._end == 64 * 64 * 4
        mapping.clear()
        assert read.eq(value).all()
    assert not mapping


def test_a_tensor_outlives_its_mapping_but_no_file_does(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = OFFLOADS["disk"]().tensors()
    held["x"] = torch.arange(10.0)
    value = held["x"]
    del held
    gc.collect()
    assert torch.equal(value, torch.arange(10.0))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error_that_says_what_to_do():
    class Full:
        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    file = ScratchFile()
    file._file = Full()
    with pytest.raises(OutputError, match=r"No space left on device \([\d.]+ GB free\).*TMPDIR"):
        file.put(torch.ones(3), None)
