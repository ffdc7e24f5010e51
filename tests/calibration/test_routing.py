"""Statistics of experts: each from its own tokens without padding, shrunk toward the layer where tokens are few."""

import torch
from support.experts import tiny_experts
from support.models import padded_batches

from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.whitening.shrinkage import shrinkage

LAYER = "model.layers.1.mlp.experts"


def gathered(model, batches, outputs="empirical"):
    """Statistics of all layers over batches, complete."""
    layers = LayerSet(find_targets(model))
    statistics = StatisticsCollector(model, layers, outputs)
    for batch in batches:
        mask = TokenMask(batch["attention_mask"].bool())
        with torch.enable_grad(), statistics.observing(mask) as observation:
            loss = model(**batch).loss
            observation.forward_done()
            terms = int((batch["labels"][:, 1:] != -100).sum())
            statistics.add_loss(loss, terms, terms)
            loss.backward()
            statistics.collect_gradients(terms)
    statistics.complete()
    return statistics


def of_tokens(model, batches):
    """Inputs of each expert of `LAYER`, and of the same tokens inside of it, from the router and the weights alone."""
    rows = {}

    def see(module, args):
        hidden, chosen, _ = args
        for number in range(4):
            token = (chosen == number).any(1) & model.counting
            x = hidden[token]
            wide = x @ module.gate_up_proj[number].T
            gate, up = wide.chunk(2, -1)
            rows.setdefault(f"{LAYER}.{number}.gate_up_proj", []).append(x)
            rows.setdefault(f"{LAYER}.{number}.down_proj", []).append(torch.nn.functional.silu(gate) * up)

    handle = model.get_submodule(LAYER).register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches:
            model.counting = batch["attention_mask"].bool().flatten()
            model(**batch)
    handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_second_moments_are_of_the_tokens_of_each_expert_without_padding():
    torch.manual_seed(0)
    model, batches = tiny_experts(), padded_batches()
    expected = of_tokens(model, batches)
    with StandIns(model).meanwhile():
        moments = gathered(model, batches).moments
    assert len(expected) == 8
    for name, X in expected.items():
        assert moments.tokens[name] == len(X) > 0
        torch.testing.assert_close(moments.input_sums[name], X.T @ X, rtol=1e-4, atol=1e-4)


def test_gradients_of_experts_are_those_of_the_stacked_parameters():
    torch.manual_seed(0)
    model, batches = tiny_experts("gpt_oss"), padded_batches()
    total = 0
    for batch in batches:
        terms = int((batch["labels"][:, 1:] != -100).sum())
        (model(**batch).loss * terms).backward()
        total += terms
    name = "model.layers.0.mlp.experts"
    expected = model.get_submodule(name).gate_up_proj.grad.clone() / total
    model.zero_grad()
    with StandIns(model).meanwhile():
        statistics = gathered(model, batches)
        for number in range(4):
            G = statistics.mean_gradient(f"{name}.{number}.gate_up_proj")
            torch.testing.assert_close(G, expected[number].T, rtol=1e-3, atol=1e-6)


def test_second_moments_at_the_owner_are_shrunk_towards_the_layer():
    torch.manual_seed(0)
    model, batches = tiny_experts(), padded_batches()
    with StandIns(model).meanwhile():
        statistics = gathered(model, batches)
        sums, tokens = statistics.moments.input_sums, statistics.moments.tokens
        names = [f"{LAYER}.{number}.down_proj" for number in range(4)]
        for kind in ("input_sums", "output_sums"):
            sums = getattr(statistics.moments, kind)
            mean = sum(sums[name] for name in names) / sum(tokens[name] for name in names)
            for name in names:
                A = sums[name] / tokens[name]
                w = shrinkage(A, tokens[name], mean)
                assert 0 < w <= 1
                _, whole = statistics.layer_at(0, name, inputs=True)
                expected = tokens[name] * ((1 - w) * A + w * mean)
                torch.testing.assert_close(getattr(whole, kind)[name], expected, rtol=1e-4, atol=1e-6)
        q = "model.layers.1.self_attn.q_proj"
        _, whole = statistics.layer_at(0, q, inputs=True)
        leader = statistics.moments.leaders[q]
        assert torch.equal(whole.input_sums[leader], statistics.moments.input_sums[leader])
