"""The closed form against the SVD of what it approximates, against its own gradient, and against brute force."""

import itertools

import pytest
import torch

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.kv_cache import attention
from zssvd_lightning.kv_cache.attention import LEAST, token_weights
from zssvd_lightning.kv_cache.bases import Bases, HeadSpectrum, key_spectra, value_spectra
from zssvd_lightning.kv_cache.moments import HeadSums, LayerMoments
from zssvd_lightning.kv_cache.ranks import ranks_under

D, N, GROUP, SCALING = 6, 40, 2, 0.1

ORIGIN = torch.zeros(D, dtype=torch.float64)


def correlated(count, seed):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=g, dtype=torch.float64)
    return torch.randn(count, D, generator=g, dtype=torch.float64) @ mix + 3


@pytest.fixture
def layer():
    """Moments of one cached head that two query heads read, and the tensors behind them."""
    K, V, Q = correlated(N, 0), correlated(N, 1), correlated(GROUP * N, 2)
    W = torch.randn(GROUP, D, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moments = LayerMoments(scaling=SCALING, output=torch.einsum("gdm,gem->de", W, W)[None])
    moments.add(Q.view(1, GROUP, N, D), K[None, None], V[None, None], None)
    return moments, K, V, Q, W


@pytest.fixture
def weights(layer):
    """Weights of the keys and values (N, 1), of mean 1."""
    _, K, _, Q, _ = layer
    found = token_weights(Q.view(1, GROUP, N, D), K[None, None], SCALING, torch.ones(1, N, dtype=torch.bool))
    return tuple((w[0, 0].double() / w[0, 0].double().mean())[:, None] for w in found)


def spectrum_without_damping(C, S, mean):
    return HeadSpectrum.of(C, S, mean, "test", damping=0.0)


def reconstructed(head, X, rank):
    return (X - head.mean) @ head.down[:rank].T @ head.up[:, :rank].T + head.mean


def test_keys_have_the_error_of_the_best_low_rank_product(layer, weights):
    moments, K, _, Q, _ = layer
    w, _ = weights
    head = spectrum_without_damping(
        moments.keys.covariance()[0], SCALING**2 * moments.queries.second_moment()[0], moments.keys.mean()[0]
    )
    deviations = w.sqrt() * (K - (w * K).mean(0))
    best = torch.linalg.svdvals(SCALING * Q @ deviations.T).square() / (N * GROUP * N)
    for rank in range(D + 1):
        error = (SCALING * Q @ (w.sqrt() * (K - reconstructed(head, K, rank))).T).square().mean()
        torch.testing.assert_close(error, best[rank:].sum(), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(head.errors[rank:].sum(), best[rank:].sum(), atol=1e-9, rtol=1e-6)


def test_values_have_the_error_of_the_best_low_rank_product(layer, weights):
    moments, _, V, _, W = layer
    _, w = weights
    head = spectrum_without_damping(moments.values.second_moment()[0], moments.output[0], ORIGIN)
    beside = torch.cat(list(W), 1)  # the heads that read it, beside each other
    best = torch.linalg.svdvals(w.sqrt() * V @ beside).square() / N
    for rank in range(D + 1):
        error = (w * ((V - reconstructed(head, V, rank)) @ beside).square()).sum(1).mean()
        torch.testing.assert_close(error, best[rank:].sum(), atol=1e-9, rtol=1e-6)


def test_no_change_of_encoder_decoder_or_mean_lowers_the_error(layer, weights):
    moments, K, _, Q, _ = layer
    w, _ = weights
    S = SCALING**2 * moments.queries.second_moment()[0]
    head = spectrum_without_damping(moments.keys.covariance()[0], S, moments.keys.mean()[0])
    parts = [t.clone().requires_grad_() for t in (head.down[:3], head.up[:, :3], head.mean, head.mean)]

    def error():
        down, up, taken, given = parts
        return (w * (((K - taken) @ down.T @ up.T + given - K) @ (SCALING * Q).T).square()).mean()

    for gradient in torch.autograd.grad(error(), parts):
        assert gradient.abs().max() < 1e-8
    least = error().item()
    for part in parts:
        for _ in range(5):
            step = 1e-2 * torch.randn_like(part)
            with torch.no_grad():
                part.add_(step)
                assert error().item() > least - 1e-12
                part.sub_(step)


def test_errors_in_units_that_can_be_added(layer, weights):
    moments, K, _, Q, _ = layer
    w, _ = weights
    keys, values = key_spectra(moments, 0)[0], value_spectra(moments, 0)[0]
    logits = SCALING * Q @ (w.sqrt() * (K - (w * K).mean(0))).T
    assert keys.errors.sum().item() == pytest.approx(logits.square().mean().item(), rel=1e-2)  # damped
    assert values.errors.sum().item() == pytest.approx(1.0, rel=1e-2)
    assert not values.mean.any()  # those that receive most attention are near zero
    pinned = [keys.errors[3:].sum().item(), values.errors[3:].sum().item()]
    assert pinned == pytest.approx([0.0691638, 0.0214860], rel=1e-4)


def test_tokens_count_by_the_attention_that_they_receive(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 2)
    Q, K = torch.randn(2, 6, 5, D), torch.randn(2, 3, 5, D)
    counts = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()  # padding on either side
    found = token_weights(Q, K, SCALING, counts)
    logits = torch.zeros(2, 6, 5, requires_grad=True)  # added to those of the keys, for all queries
    changes, received = torch.zeros(2, 6, 5), torch.zeros(2, 6, 5)
    for row, head in itertools.product(range(2), range(6)):
        for t in counts[row].nonzero()[:, 0].tolist():
            seen = [s for s in range(t + 1) if counts[row, s]]
            p = (SCALING * K[row, head // 2, seen] @ Q[row, head, t] + logits[row, head, seen]).softmax(0)
            received[row, head, seen] += p.detach()
            for own, s in enumerate(seen):
                changes[row, head, s] += torch.autograd.grad(p[own], logits, retain_graph=True)[0][row, head, s]
    at = counts[:, None].expand(2, 3, 5)
    for weights, of_heads in zip(found, (changes, received), strict=True):
        expected = of_heads.unflatten(1, (3, 2)).sum(2).clamp_min(LEAST)
        torch.testing.assert_close(weights[at], expected[at], atol=1e-6, rtol=1e-5)


def test_value_of_the_token_that_all_attend_to_is_kept():
    """A first key that draws all attention, with a value that is small and unlike the others: the attention sink."""
    Q, K, V = torch.randn(1, 2, N, D), torch.randn(1, 1, N, D), correlated(N, 4).float()[None, None]
    Q[..., 0], K[:, :, 0, 0], V[:, :, 0] = 3.0, 30.0, torch.tensor([0.3, -0.3] * (D // 2))
    moments = LayerMoments(scaling=SCALING)
    moments.add(Q, K, V, None)
    bases = Bases.of(value_spectra(moments, 0), (2,))
    errors = (bases.decode(bases.encode(V)) - V)[0, 0].abs().amax(1)
    assert errors[0] < 0.03
    assert errors[1:].max() > 0.3


def test_heads_that_attend_to_one_token_alone():
    X = correlated(1, 0).float()[None, None]
    moments = LayerMoments()
    moments.add(X, X, X, None)
    torch.testing.assert_close(moments.keys.mean()[0], X[0, 0, 0].double())


def test_a_head_that_nothing_reads_costs_nothing():
    C = correlated(N, 0).T.cov()
    head = HeadSpectrum.of(C, torch.zeros_like(C), torch.zeros(D, dtype=torch.float64), "test")
    assert not head.errors.any()
    torch.testing.assert_close(head.up @ head.down, torch.eye(D, dtype=torch.float64))


def test_rank_of_all_is_the_identity_and_the_error_falls_with_the_rank(layer):
    moments, K, *_ = layer
    head = key_spectra(moments, 0)[0]
    X = K[None, None]
    errors = []
    for rank in range(1, D + 1):
        bases = Bases.of([head], (rank,)).cast(X.device, X.dtype)
        kept = bases.encode(X)
        assert kept.shape == (1, N, rank)
        errors.append((SCALING * layer[3] @ (X - bases.decode(kept))[0, 0].T).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    torch.testing.assert_close(head.up @ head.down, torch.eye(D, dtype=torch.float64), atol=1e-8, rtol=0)


def test_heads_of_different_ranks_beside_each_other():
    X = torch.randn(2, 3, 5, D)
    sums = HeadSums()
    sums.add(X.transpose(1, 2).flatten(0, 1))
    S = torch.eye(D, dtype=torch.float64)
    parts = zip(sums.covariance(), sums.mean(), strict=True)
    heads = [HeadSpectrum.of(C, S, mean, "test", 0.0) for C, mean in parts]
    bases = Bases.of(heads, (2, D, 1))
    decoded = bases.decode(bases.encode(X))
    assert torch.equal(decoded[:, 1], X[:, 1])
    for h, rank in ((0, 2), (2, 1)):
        expected = reconstructed(heads[h], X[:, h].double(), rank)
        torch.testing.assert_close(decoded[:, h].double(), expected, atol=1e-5, rtol=0)


def test_sums_are_of_the_positions_that_count():
    keys, queries = torch.randn(2, 3, 5, D) + 100, torch.randn(2, 6, 5, D)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    moments = LayerMoments()
    moments.add(queries[:1], keys[:1], keys[:1], mask[:1])
    moments.add(queries[1:], keys[1:], keys[1:], mask[1:])
    weights = [w.double() for w in token_weights(queries, keys, 1.0, mask)]
    for head in range(3):
        rows = keys[:, head][mask].double()
        w, u = (of[:, head][mask] / of[:, head][mask].sum() for of in weights)
        torch.testing.assert_close(moments.keys.mean()[head], w @ rows)
        torch.testing.assert_close(moments.keys.covariance()[head], rows.T.cov(correction=0, aweights=w))
        torch.testing.assert_close(moments.values.second_moment()[head], (u[:, None] * rows).T @ rows)
        reading = queries[:, 2 * head : 2 * head + 2].transpose(1, 2)[mask].double().flatten(0, 1)
        torch.testing.assert_close(moments.queries.second_moment()[head], reading.T @ reading / len(reading))


def test_ranks_are_those_of_least_error_by_brute_force():
    errors = [torch.rand(size, dtype=torch.float64).sort(descending=True).values for size in (3, 4, 2)]
    for ratio in (0.34, 0.5, 0.7, 1.0):
        allowed = int(ratio * 9 + 1e-9)
        ranks = ranks_under(errors, ratio)
        options = [r for r in itertools.product(range(1, 4), range(1, 5), range(1, 3)) if sum(r) <= allowed]
        least = min(sum(float(e[k:].sum()) for e, k in zip(errors, r, strict=True)) for r in options)
        assert sum(ranks) <= allowed
        assert sum(float(e[k:].sum()) for e, k in zip(errors, ranks, strict=True)) == pytest.approx(least, abs=1e-12)
    assert ranks_under(errors, 1.0) == [3, 4, 2]


def test_ratio_that_leaves_nothing_to_a_head():
    with pytest.raises(BudgetError, match=r"least ratio is 0\.3333"):
        ranks_under([torch.rand(3)] * 4, 0.3)
