"""Corrections that keep the second moments keep their roots, and change nothing by it."""

import copy

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import compress
from zssvd_lightning.whitening.kept_roots import KeptRoots

NATURAL = {"preset": "best", "corrections": 3, "correction_batches": 2, "prune_ratio": 0.4}
PROJECTED = {"preset": "zs-svd", "corrections": 2, "correction_batches": 2, "fresh_moments": False, "prune_ratio": 0.4}


class Seen:
    """All collections of roots that were made."""

    def __init__(self, monkeypatch):
        self.roots = []
        make = KeptRoots.__init__

        def noted(roots, active=True):
            make(roots, active)
            self.roots.append(roots)

        monkeypatch.setattr(KeptRoots, "__init__", noted)

    @property
    def used(self):
        return sum(roots.used for roots in self.roots)


def compressed(settings, model):
    model = copy.deepcopy(model)
    report = compress(model, token_batches(4), progress=False, **settings)
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    return ranks, model.state_dict()


@pytest.mark.parametrize("settings", [NATURAL, PROJECTED], ids=["natural", "projected"])
def test_results_are_bit_for_bit_those_without_kept_roots(settings, monkeypatch):
    seen, model = Seen(monkeypatch), tiny_llama()
    ranks, weights = compressed(settings, model)
    assert seen.used > 0
    assert not any(roots.nbytes for roots in seen.roots)
    before = seen.used
    monkeypatch.setattr(KeptRoots, "_fits", lambda *_: False)
    other_ranks, other_weights = compressed(settings, model)
    assert seen.used == before
    assert ranks == other_ranks
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize("change", [{"fresh_moments": True}, {"memory": "blocks"}])
def test_moments_that_change_or_lie_in_files_have_no_kept_roots(change, monkeypatch):
    seen = Seen(monkeypatch)
    compressed(NATURAL | change, tiny_llama())
    assert seen.used == 0
