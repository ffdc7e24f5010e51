"""Properties of a compression, over every pair of a metric, a selection rule, a storage and a correction there is."""

import copy
import itertools
from functools import cache

import pytest
import torch
from support.models import tiny_llama, token_batches

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.config.corrections import CORRECTIONS
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.registry import KINDS
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.whitening.metrics import METRICS

RATIO = {"hq": 0.6}
EVERY = list(itertools.product(METRICS, RULES, STORAGES))
ALLOWED = [names for names in EVERY if STORAGES[names[2]].in_8_bits is None or RULES[names[1]].chooses_bits]


def pairs(names):
    """Pairs of a metric, a rule and a storage, each with its place."""
    return set(itertools.combinations(enumerate(names), 2))


def covering():
    """Few of those that are allowed, with all pairs in them: always the one with most of the pairs that are missing."""
    missing = set().union(*map(pairs, ALLOWED))
    while missing:
        names = max(ALLOWED, key=lambda names: len(pairs(names) & missing))
        missing -= pairs(names)
        yield names


COVERING = list(covering())
EACH = list({rule: (metric, rule, storage) for metric, rule, storage in COVERING}.values())
"""Each rule once."""


@pytest.mark.parametrize("parts", list(itertools.combinations(range(3), 2)))
def test_all_pairs_are_among_the_few(parts):
    few, every = ({tuple(names[part] for part in parts) for names in found} for found in (COVERING, ALLOWED))
    assert few == every


@cache
def dense():
    torch.manual_seed(0)
    return tiny_llama()


@cache
def compressed(metric, selection, storage, correction=None):
    """A compressed model and its report."""
    settings = {"corrections": 0} if correction is None else {"correction_step": correction, "correction_batches": 2}
    config = CompressionConfig(RATIO.get(storage, 0.4), metric=metric, selection=selection, storage=storage, **settings)
    model = copy.deepcopy(dense())
    return model, compress(model, token_batches(), config, progress=False)


@pytest.mark.parametrize("names", COVERING, ids="-".join)
def test_the_budget_is_met_and_the_layers_are_those_of_the_report(names):
    model, report = compressed(*names)
    assert report.reached >= report.asked
    budget = Budget({n: x.shape for n, x in report.layers.items()}, report.asked, storage=names[-1])
    for name, told in report.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, CompressedLinear) == (told.rank is not None or told.in_8_bits)
        assert getattr(layer, "rank", None) == told.rank
        assert layer.weight.shape == told.shape
        assert told.kept == budget.kept_of(name, told.rank, eight_bit=told.in_8_bits and budget.chooses_bits)
    assert sum(told.kept for told in report.layers.values()) == report.parameters_after
    with torch.no_grad():
        assert model(**token_batches()[0]).logits.isfinite().all()


@pytest.mark.parametrize("names", [names for names in EVERY if names not in ALLOWED], ids="-".join)
def test_rules_that_choose_no_bits_are_refused_by_storages_that_leave_the_choice(names):
    metric, selection, storage = names
    with pytest.raises(ConfigError, match=f"storage '{storage}' needs selection .* but selection is '{selection}'"):
        CompressionConfig(metric=metric, selection=selection, storage=storage)


@pytest.mark.parametrize("names", EACH, ids="-".join)
def test_a_compression_gives_the_same_again(names):
    model, report = compressed(*names)
    again = copy.deepcopy(dense())
    metric, rule, storage = names
    config = CompressionConfig(RATIO.get(storage, 0.4), metric=metric, selection=rule, storage=storage, corrections=0)
    repeated = compress(again, token_batches(), config, progress=False)
    assert {n: x.rank for n, x in repeated.layers.items()} == {n: x.rank for n, x in report.layers.items()}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_is_in_layers_of_its_kinds(storage):
    kinds = set()
    for model, _ in (compressed(*names) for names in COVERING if names[2] == storage):
        kinds |= {module.kind for module in model.modules() if isinstance(module, CompressedLinear)}
    form = STORAGES[storage]
    expected = {form.layer} | ({"pivoted_columns"} if form.layer == "pivoted" else set())
    if form.rounded is not None:
        expected = {"int8_low_rank"}
    if form.in_8_bits is not None:
        expected |= {"int8_low_rank", "int8"}
    assert kinds <= expected | ({"int8"} if form.rounded_dense is not None else set())
    assert kinds & expected
    assert kinds <= KINDS.keys()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("storage", STORAGES)
def test_corrections_go_with_every_storage_and_keep_the_budget(correction, storage):
    model, report = compressed("two_sided", "curvature", storage, correction)
    assert report.reached >= report.asked
    assert len(report.losses) >= 2
    with torch.no_grad():
        assert model(**token_batches()[0]).logits.isfinite().all()
