"""Tensors in scratch files."""

import copy

import pytest
import torch

from zssvd_lightning.decomposition.factors import Factors
from zssvd_lightning.sweep.scratch import InScratchFiles
from zssvd_lightning.whitening.spectrum import Spectrum


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4, dtype=torch.float64).T,
        torch.randn(2, 3, 4).to(torch.bfloat16)[:, 1:],
        torch.rand(2, 1, 3) > 0.5,
        torch.tensor(7),
        torch.empty(0, 5),
        torch.ones(1, 3).expand(4, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_what_is_read_is_what_was_written(tensor):
    stored = InScratchFiles().tensors()
    stored["before"], stored["x"], stored["after"] = torch.ones(3), tensor, torch.zeros(5)
    assert torch.equal(stored["x"], tensor)
    assert stored["x"].dtype == tensor.dtype
    assert torch.equal(stored["after"], torch.zeros(5))
    transposed = tensor.dim() == 2 and tensor.T.is_contiguous() and not tensor.is_contiguous()
    assert not transposed or stored["x"].stride() == tensor.stride()


def test_values_of_several_tensors():
    store = InScratchFiles()
    factors, spectra = store.tuples(Factors), store.tuples(Spectrum)
    factors["a"] = Factors(torch.ones(2, 1), torch.zeros(1, 3))
    spectra["a"] = Spectrum(torch.ones(2, 2), torch.arange(2.0), torch.zeros(2, 3))
    assert torch.equal(factors["a"].down, torch.zeros(1, 3))
    assert torch.equal(spectra["a"].sigma, torch.arange(2.0))


def test_a_copy_can_differ_and_outlives_the_original():
    first = InScratchFiles().tensors()
    first["x"], first["y"] = torch.ones(2), torch.zeros(2)
    second = copy.copy(first)
    second["x"] = torch.full((2,), 5.0)
    del second["y"]
    assert torch.equal(first["x"], torch.ones(2))
    assert list(first) == ["x", "y"]
    first.clear()
    del first
    assert torch.equal(second["x"], torch.full((2,), 5.0))
