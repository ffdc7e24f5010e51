"""The curvature along each component, estimated anew, against autograd and where K-FAC is exact."""

import copy

import pytest
import torch
from support.callbacks import Keeps
from support.interruption import interrupted
from support.models import CausalLM, loader, padded_batches, tiny_gpt2, tiny_llama, token_batches, trainer
from support.samplers import weight
from torch.nn.functional import cross_entropy

from zssvd_lightning import CompressionConfig, Phase, compress
from zssvd_lightning.compression.course import course, to_first_truncation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.pipeline import plan
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.whitening.cholesky import Root, Whitening, safe_cholesky
from zssvd_lightning.whitening.spectrum import Spectrum

REESTIMATED = {"metric": "two_sided", "selection": "curvature", "reestimate": True, "correction_batches": 3}


def test_squared_derivatives_are_those_of_autograd_token_by_token():
    X, D, W = torch.randn(7, 4).double(), torch.randn(7, 6).double(), weight(6, 4)
    there = Whitening(Root(*safe_cholesky(X.T @ X, "x")), Root(*safe_cholesky(D.T @ D, "x")))
    spectrum = Spectrum.of(W, there)
    expected = 0
    for x, d in zip(X, D, strict=True):
        sigma = spectrum.sigma.clone().requires_grad_()
        (d @ (spectrum.left * sigma @ spectrum.right) @ x).backward()
        expected = expected + sigma.grad.square()
    torch.testing.assert_close(spectrum.squared_derivatives(X, D), expected)


def test_curvature_is_one_where_gradients_do_not_depend_on_inputs():
    X, D, W = torch.randn(40, 5).double(), torch.randn(30, 8).double(), weight(8, 5)
    there = Whitening(Root(*safe_cholesky(X.T @ X / 40, "x")), Root(*safe_cholesky(D.T @ D / 30, "x")))
    pairs = X.repeat(30, 1), D.repeat_interleave(40, 0)
    found = Spectrum.of(W, there).squared_derivatives(*pairs) / len(pairs[0])
    torch.testing.assert_close(found, torch.ones(5).double())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_it_is_gathered_over_the_tokens_that_count(build):
    model, batches = build().eval().double(), padded_batches()
    compression = Compression(copy.deepcopy(model), CompressionConfig(**REESTIMATED), progress=False)
    first, _ = to_first_truncation(course(compression.config))
    gather(compression, batches, first.gathers)
    compression.take(first)
    gather(compression, batches, Phase.CORRECT)
    compression.gathering.complete()
    names = list(compression.targets)
    expected, terms = dict.fromkeys(names, 0), 0
    for batch in batches[:3]:
        seen = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, seen=seen: seen.update({name: (args[0], output)})
            )
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        mask = batch["attention_mask"].bool()
        for name, gradient in zip(names, gradients, strict=True):
            X, D = seen[name][0].detach()[mask], gradient[mask]
            expected[name] = expected[name] + compression.gathering.spectra[name].squared_derivatives(X, D)
        terms += int((labels[:, 1:] != -100).sum())
    for name in names:
        found = compression.gathering.component_curvature(name)
        torch.testing.assert_close(found, expected[name] / terms, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES.those(lambda rule: rule.uses_curvature))
def test_a_curvature_of_four_counts_as_singular_values_of_twice_the_size(rule):
    shapes = {"a": (8, 8), "b": (8, 8)}
    budget = Budget(shapes, 0.5)
    sigma, delta = torch.rand(8).sort(descending=True).values, 1e-3 * torch.randn(8)
    plain = Components(sigma.flip(0).sort(descending=True).values, delta)
    curved = Components(sigma, delta, curvature=torch.full((8,), 4.0))
    twice = Components(2 * sigma, delta)
    kept = [RULES[rule]({"a": plain, "b": b}, budget) for b in (curved, twice)]
    assert {n: kept[0].rank(n) for n in shapes} == {n: kept[1].rank(n) for n in shapes}


def test_ranks_follow_what_was_estimated_and_a_plan_says_the_same():
    model, batches = tiny_llama(), token_batches()
    config = CompressionConfig(0.4, **REESTIMATED, corrections=0)
    ranks = plan(copy.deepcopy(model), batches, config, progress=False).ranks
    usual = plan(
        copy.deepcopy(model), batches, CompressionConfig(0.4, **REESTIMATED | {"reestimate": False}), progress=False
    ).ranks
    report = compress(model, batches, config, progress=False)
    assert {name: layer.rank for name, layer in report.layers.items()} == dict(ranks)
    assert ranks != usual
    assert len(report.losses) == 2
    assert report.reached >= 0.4


@pytest.mark.parametrize("statistics", [True, False])
def test_spectra_are_in_what_is_saved_until_they_are_truncated(statistics):
    config = CompressionConfig(0.4, **REESTIMATED, corrections=0, storage="mixed")
    assert interrupted(config, padded_batches(), statistics).decomposition is None


def test_in_a_fit_it_takes_its_batches_before_anything_is_truncated():
    torch.manual_seed(0)
    dense = tiny_llama()
    callback = Keeps(
        0.4, "zs-svd-line-search", corrections=0, schedule={"calibration_batches": 4}, progress=False, **REESTIMATED
    )
    assert callback.batches_needed(4) == 7
    trainer(callback, max_epochs=3).fit(CausalLM(copy.deepcopy(dense)), loader(token_batches()))
    assert callback.phase is Phase.DONE
    config = CompressionConfig(0.4, **REESTIMATED, corrections=0, rank_multiple=1)
    report = compress(dense, token_batches(), config, progress=False)
    assert [layer.rank for layer in callback.report.layers.values()] == [layer.rank for layer in report.layers.values()]


@pytest.mark.parametrize("settings", [{"metric": "input"}, {"selection": "zero_sum"}])
def test_rules_and_metrics_that_do_not_go_by_curvature_have_nothing_to_estimate(settings):
    with pytest.raises(ConfigError, match="reestimate needs metric 'two_sided'"):
        CompressionConfig(**REESTIMATED | settings)
