"""Release of the pages of mapped weights: what was written stays, and what is read afterward is the same."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zssvd_lightning._resources import resident_bytes
from zssvd_lightning.offload import pages
from zssvd_lightning.offload.pages import release_pages, released_behind

PAGE = mmap.PAGESIZE // 4
"""Float32 numbers in a page."""

linux = pytest.mark.skipif(not Path(pages.PAGEMAP).exists(), reason="the system has no page map")


def mapped(folder, *, count=2, numbers=64 * PAGE):
    """Tensors that are mapped privately from a file of safetensors, as transformers maps them, and their values."""
    values = {f"w{i}": torch.randn(numbers, generator=torch.Generator().manual_seed(i)) for i in range(count)}
    save_file(values, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors"), values


def held_in_files():
    found = resident_bytes("RssFile")
    assert found is not None
    return found


@linux
def test_pages_of_a_file_leave_memory_and_are_read_again(tmp_path):
    tensors, values = mapped(tmp_path, numbers=4096 * PAGE)
    assert all(torch.equal(tensors[name], value) for name, value in values.items())  # all pages are resident now
    before, size = held_in_files(), sum(value.nbytes for value in values.values())
    assert release_pages(tensors.values()) >= size - 2 * mmap.PAGESIZE
    assert held_in_files() <= before - 0.9 * size
    assert all(torch.equal(tensors[name], value) for name, value in values.items())


@linux
def test_written_pages_keep_their_values(tmp_path):
    tensors, values = mapped(tmp_path)
    tensor, value = tensors["w1"], values["w1"].clone()
    for place in (0, 5 * PAGE + 7, 20 * PAGE, 63 * PAGE + PAGE - 1):  # pages in between stay those of the file
        tensor[place], value[place] = place + 0.5, place + 0.5
    tensor[30 * PAGE : 34 * PAGE] = value[30 * PAGE : 34 * PAGE] = -1.0
    assert tensor.sum().isfinite()
    for _ in range(3):
        assert release_pages(tensors.values()) > 0
        assert torch.equal(tensor, value)
        assert torch.equal(tensors["w0"], values["w0"])
    tensor.mul_(2.0)
    assert release_pages([tensor]) <= 2 * mmap.PAGESIZE  # at most those that it shares with its neighbors
    assert torch.equal(tensor, value * 2.0)


@linux
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(512, 1024),
        lambda: torch.zeros(512, 1024),
        lambda: torch.randn(512, 1024).share_memory_(),
        lambda: torch.randn(512, 1024).T[3:400:2],
    ],
    ids=["memory", "zeros", "shared", "strided"],
)
def test_memory_without_a_file_keeps_its_values(make):
    torch.manual_seed(0)
    tensor = make()
    value = tensor.clone()
    release_pages([tensor])
    assert torch.equal(tensor, value)
    tensor.add_(1.0)
    release_pages([tensor])
    assert torch.equal(tensor, value + 1.0)


def test_tensors_elsewhere_and_empty_ones_are_left_alone():
    assert release_pages([torch.empty(4, device="meta"), torch.empty(0), torch.eye(3).to_sparse()]) == 0
    assert release_pages([torch.zeros(()).expand(1000, 1000)]) == 0


@linux
def test_a_page_map_that_cannot_be_read_releases_nothing(tmp_path, monkeypatch):
    tensors, values = mapped(tmp_path)
    assert torch.equal(tensors["w0"], values["w0"])
    monkeypatch.setattr(pages, "PAGEMAP", str(tmp_path / "none"))
    assert release_pages(tensors.values()) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert release_pages(tensors.values()) == 0


@linux
def test_blocks_are_released_once_they_have_run(tmp_path):
    """Outputs and gradients are those of weights in memory, and no hook is left."""
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024) for _ in range(8)]
    model = nn.Sequential(*layers)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    x = torch.randn(4, 1024)
    expected = model(x)
    expected.sum().backward()
    gradients = [layer.weight.grad for layer in layers]
    model.zero_grad()
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    before = held_in_files()
    with released_behind(model):
        found = model(x)
        assert held_in_files() - before < 0.4 * size
    found.sum().backward()
    assert torch.equal(found, expected)
    assert all(map(torch.equal, (layer.weight.grad for layer in layers), gradients))
    assert not torch.nn.modules.module._global_forward_hooks
    with pytest.raises(ZeroDivisionError), released_behind(model):
        _ = 1 / 0
    assert not torch.nn.modules.module._global_forward_hooks
