"""Statistics, originals, factors and spectra of a fit that are held elsewhere, and gradients that are not held."""

import pytest
import torch
from support.callbacks import short
from support.media import OfAnAccelerator, fill_disk
from support.models import FAMILIES, CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torch import nn

from zssvd_lightning import Phase, ZSSVDCallback, compress
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.errors import ConfigError, ContradictionError, OutputError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.offload.stores import OFFLOADS, Offloading
from zssvd_lightning.whitening.moments import Moments

METHODS = {
    "one shot": {"corrections": 0},
    "line search": {},
    "kept moments": {"fresh_moments": False, "corrections": 2},
    "natural": {"preset": "best", "corrections": 2},
    "reestimated": {"preset": "best", "corrections": 0, "reestimate": True},
    "refit": {"preset": "mpifa"},
    "two truncations": {"truncations": 2, "corrections": 0},
}


def fitted(family, offload, **settings):
    torch.manual_seed(0)
    module = CausalLM(FAMILIES[family].build())
    callback = short(calibration_batches=2, offload=offload, **settings)
    trainer(callback, max_epochs=20, max_steps=40).fit(module, loader(FAMILIES[family].batches()))
    assert callback.phase is Phase.DONE
    return {name: layer.rank for name, layer in callback.report.layers.items()}, module.state_dict()


@pytest.mark.parametrize(
    ("family", "method", "offload"),
    [
        ("llama", "natural", "disk"),
        ("llama", "reestimated", "disk"),
        ("llama", "refit", "disk"),
        ("llama", "natural", "copies"),
        ("llama", "one shot", "cpu"),
        ("gpt2", "one shot", "disk"),
        ("gpt2", "kept moments", "disk"),
        ("gpt2", "line search", "copies"),
        ("vit", "line search", "disk"),
        ("vit", "two truncations", "disk"),
    ],
)
def test_ranks_and_weights_are_bit_equal_wherever_things_are(family, method, offload, monkeypatch):
    if offload == "copies":
        monkeypatch.setitem(OFFLOADS, offload, lambda: Offloading(OfAnAccelerator))
    (ranks, weights), (others, other) = (fitted(family, place, **METHODS[method]) for place in ("none", offload))
    assert ranks == others
    assert weights.keys() == other.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("writes", [1, 40, 100])
def test_a_full_disk_stops_the_fit_and_loses_nothing(writes, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, writes)
    module = CausalLM()
    before = state_of(module)
    with pytest.raises(OutputError, match="No space left"):
        trainer(short(calibration_batches=2, offload="disk"), max_steps=40).fit(module, loader(token_batches(8)))
    assert_same_state(before, state_of(module))
    assert list(tmp_path.iterdir()) == []


def test_where_things_cannot_be_is_refused():
    with pytest.raises(ContradictionError, match="offload cannot be 'disk'"):
        compress(tiny_llama(), [], memory="blocks", offload="disk")
    with pytest.raises(ContradictionError, match="result of calibrate is in memory"):
        calibrate(tiny_llama(), token_batches(1), offload="cpu")
    with pytest.raises(ConfigError, match="offload"):
        ZSSVDCallback(offload="disc")


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulation"])
def test_at_most_one_gradient_is_in_memory(settings, monkeypatch):
    module = CausalLM()
    targets, held, add = find_targets(module), [], Moments.add_gradient

    def counting(self, *args):
        held.append(sum(target.module.weight.grad is not None for target in targets.values()))
        add(self, *args)

    monkeypatch.setattr(Moments, "add_gradient", counting)
    compression = short(calibration_batches=4, corrections=0)
    trainer(compression, max_steps=8, **settings).fit(module, loader(token_batches(16)))
    assert compression.report is not None
    assert held == [1] * (4 * len(targets))


class Twice(nn.Module):
    """A layer that runs twice in a forward pass, and whose weight other code reads."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.shared(torch.tanh(self.shared(x)))) + x @ self.shared.weight


def test_all_parts_of_a_gradient_count():
    torch.manual_seed(0)
    model, batches = Twice(), [torch.randn(5, 16) for _ in range(3)]

    def loss(model, x):
        return model(x).square().mean()

    settings = {"loss": loss, "terms": lambda x: x.numel(), "progress": False}
    moments = calibrate(model, batches, preset="zs-svd", **settings)
    for batch in batches:
        (loss(model, batch) * batch.numel()).backward()
    for name in ("shared", "last"):
        torch.testing.assert_close(moments.gradient_sums[name], model.get_submodule(name).weight.grad)
