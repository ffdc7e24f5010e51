import pytest
import torch

from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS, TOP, top_k

DRAWS = [name for name, draw in OUTPUT_GRADIENTS.items() if draw is not None]


def drawn(name, logits, seed=0):
    return OUTPUT_GRADIENTS[name](logits.clone(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DRAWS)
def test_rounding_of_logits_changes_draws_by_rounding(name):
    """Tokens change places by likelihood, since groups of them have logits that differ less than they are disturbed."""
    logits = torch.randn(200, 12).repeat_interleave(TOP // 4, 1) + 1e-7 * torch.randn(200, 3 * TOP)
    disturbed = logits + 2e-7 * torch.randn_like(logits)
    assert not torch.equal(disturbed.argsort(), logits.argsort())
    torch.testing.assert_close(drawn(name, disturbed), drawn(name, logits), atol=1e-6, rtol=0)
    assert not torch.allclose(drawn(name, logits), drawn(name, logits, seed=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_on_every_device(name):
    logits = torch.randn(50, 3 * TOP)
    torch.testing.assert_close(drawn(name, logits.cuda()).cpu(), drawn(name, logits))


def test_ties_of_the_most_likely_tokens_go_to_the_first():
    logits = torch.zeros(3, 2 * TOP)
    logits[1, TOP + 5] = 1.0
    seen = top_k(logits, torch.Generator().manual_seed(0)) != 0
    first = torch.arange(2 * TOP) < TOP
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[2], first)
    assert torch.equal(seen[1], (torch.arange(2 * TOP) < TOP - 1) | (torch.arange(2 * TOP) == TOP + 5))


def test_noise_of_a_position_is_standard_normal_and_independent_of_that_of_others():
    """All tokens equally likely: `v = (e - mean e) / sqrt(k)`, whose entries have variance `(k - 1) / k^2`."""
    k = 8
    e = torch.stack([drawn("top_k", torch.zeros(2, k), seed) for seed in range(1500)]).double() * k / (k - 1) ** 0.5
    flat = e.flatten(1)
    assert flat.mean(0).abs().max() < 0.11
    assert (flat.pow(4).mean(0) - 3).abs().max() < 0.9
    expected = torch.block_diag(*[(k * torch.eye(k) - 1) / (k - 1)] * 2).double()
    assert (flat.T @ flat / len(flat) - expected).abs().max() < 0.15


def test_no_label_is_drawn_that_cannot_occur():
    logits = torch.full((500, 6), -torch.inf)
    logits[:, [1, 4]] = 0.0
    assert (drawn("sampled", logits) < 0).nonzero()[:, 1].unique().tolist() == [1, 4]
