import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.callbacks.prehab import LowRankPrehab
from zssvd_lightning.errors import CheckpointError, ConfigError, NonFiniteError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.prehab.regularizers import REGULARIZERS, SCHEDULES, Term, nuclear_norm, stable_rank
from zssvd_lightning.prehab.run import PrehabRun

SHAPES = [(7, 5), (5, 7), (6, 6)]


def layer(m, n, seed=0):
    """A weight and the Cholesky factor of a second moment, in float64."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, dtype=torch.float64, generator=g) * torch.logspace(0, -1, n, dtype=torch.float64)
    return torch.randn(m, n, dtype=torch.float64, generator=g), torch.linalg.cholesky(X.T @ X / len(X))


def converged(W, A) -> Term:
    found = stable_rank(W, A)
    for _ in range(200):
        found = stable_rank(W, A, found.u)
    return found


def by_decomposition(name, W, L):
    """The regularizer and its gradient, by autograd through all singular values."""
    W = W.clone().requires_grad_()
    sigma = torch.linalg.svdvals(W @ L)
    value = sigma.sum() if name == "nuclear" else sigma.square().sum() / sigma[0].square()
    value.backward()
    return value.detach(), W.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_value_and_gradient_are_those_of_the_singular_values(name, shape):
    W, L = layer(*shape)
    found = nuclear_norm(W, L) if name == "nuclear" else converged(W, L @ L.T)
    value, gradient = by_decomposition(name, W, L)
    torch.testing.assert_close(found.value, value, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-7, atol=1e-10)


def test_the_weights_are_whitened_by_the_inputs():
    """Inputs 3 times as long along the second axis, by hand: `W L` has the singular values 1 and 6, W has 1 and 2."""
    W, A = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.diag(torch.tensor([1.0, 9.0])).double()
    for name, expected, without in (("stable_rank", 37 / 36, 5 / 4), ("nuclear", 7, 3)):
        evaluate = nuclear_norm if name == "nuclear" else converged
        for second_moment, value in ((A, expected), (torch.eye(2).double(), without)):
            kept, jitter = REGULARIZERS[name].kept(second_moment, "a layer")
            assert float(evaluate(W, kept).value) == pytest.approx(value)
            assert jitter == 0


def test_the_stable_rank_takes_a_singular_second_moment():
    singular = torch.diag(torch.tensor([1.0, 4.0, 0.0])).double()
    kept, jitter = REGULARIZERS["stable_rank"].kept(singular, "a layer")
    assert float(converged(torch.eye(3).double(), kept).value) == pytest.approx(5 / 4)
    assert jitter == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stable_rank_is_between_1_and_the_full_rank(shape):
    W, L = layer(*shape)
    assert 1 < float(stable_rank(W, L @ L.T).value) < min(shape)
    orthogonal = torch.linalg.qr(W if shape[0] >= shape[1] else W.T).Q
    orthogonal = orthogonal if shape[0] >= shape[1] else orthogonal.T
    assert float(stable_rank(orthogonal, torch.eye(shape[1]).double()).value) == pytest.approx(min(shape))
    one = torch.outer(W[:, 0], W[0])
    assert float(stable_rank(one, L @ L.T).value) == pytest.approx(1)


def test_weights_of_zero_have_no_stable_rank_and_may_leave():
    A, (W, _) = torch.eye(5), layer(7, 5)
    found = stable_rank(torch.zeros(7, 5), A)
    assert float(found.value) == 0
    assert not found.gradient.any()
    for _ in range(50):
        found = stable_rank(W.float(), A, found.u)
    assert float(found.value) == pytest.approx(float(by_decomposition("stable_rank", W, A.double())[0]), rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 40), (200, 100)])
def test_the_first_iterations_are_enough_and_few_more_follow_the_weights(shape):
    W, L = layer(*shape)
    W, L = W.float(), L.float()
    found = stable_rank(W, L @ L.T)
    for step in range(10):
        true = by_decomposition("stable_rank", W, L)[0]
        torch.testing.assert_close(found.value, true, rtol=1e-2, atol=0)
        W = W + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(step))
        found = stable_rank(W, L @ L.T, found.u)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_vector_that_has_not_converged_errs_to_a_higher_rank_and_gives_no_gradient_at_the_highest(shape):
    W, L = layer(*shape)
    U, sigma, _ = torch.linalg.svd(W @ L)
    true = (sigma.square().sum() / sigma[0].square()).item()
    at_the_highest = []
    for column in range(len(W)):  # the last ones of a tall W are in its left null space
        found = stable_rank(W, L @ L.T, U[:, column])
        assert true * (1 - 1e-12) <= float(found.value) <= min(shape) * (1 + 1e-12)
        at_the_highest.append(float(found.value) > min(shape) * (1 - 1e-12))
        assert bool(found.gradient.any()) is not at_the_highest[-1]
    assert float(stable_rank(W, L @ L.T, U[:, 1]).value) > true * 1.01
    assert any(at_the_highest)


def test_the_start_is_the_same_in_every_run():
    W, A = torch.randn(7, 5), torch.eye(5)
    before, found = torch.get_rng_state(), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(stable_rank(W, A).u)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)
    assert torch.equal(before, torch.get_rng_state())


def preparation(name, A, *modules) -> PrehabRun:
    """Of layers that share an input."""
    targets = {f"layers.{k}": Target(f"layers.{k}", module) for k, module in enumerate(modules)}
    kept = {"layers.0": REGULARIZERS[name].kept(A, "layers.0")[0].to(A)}
    return PrehabRun(targets, begins_at=0, leaders=dict.fromkeys(targets, "layers.0"), kept=kept)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_of_the_mean_over_layers_are_added_where_weights_are_stored(name):
    W, L = layer(7, 5)
    linear, stored_turned = nn.Linear(5, 7).double(), Conv1D(7, 5).double()
    linear.weight.data, stored_turned.weight.data = W.clone(), 2 * W.T.clone()
    prepared = preparation(name, L @ L.T, linear, stored_turned)
    for _ in range(100):
        linear.weight.grad, stored_turned.weight.grad = torch.ones_like(linear.weight), None
        value = prepared.add_gradients(REGULARIZERS[name], 3)
    (one, gradient), (other, turned) = by_decomposition(name, W, L), by_decomposition(name, 2 * W, L)
    assert value == pytest.approx(float(one + other) / 2, rel=1e-9)
    torch.testing.assert_close(linear.weight.grad, 1 + 1.5 * gradient, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(stored_turned.weight.grad, 1.5 * turned.T, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_is_computed_in_float32_for_bfloat16_weights(name):
    W, L = layer(60, 50)
    module = nn.Linear(50, 60).bfloat16()
    module.weight.data = W.bfloat16()
    module.weight.grad = torch.zeros_like(module.weight)
    value = preparation(name, (L @ L.T).float(), module).add_gradients(REGULARIZERS[name], 1)
    exact, gradient = by_decomposition(name, W.bfloat16().double(), L)
    assert value == pytest.approx(float(exact), rel=1e-4)
    torch.testing.assert_close(module.weight.grad.double(), gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max())


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_out_of_range_are_an_error_that_names_the_layer(name, bad):
    modules = [nn.Linear(5, 7) for _ in range(3)]
    modules[1].weight.data[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"of layers\.1 \(7, 5\) is nan: its weights"):
        preparation(name, torch.eye(5), *modules).add_gradients(REGULARIZERS[name], 1)


def test_schedules_grow_to_the_full_weight():
    assert SCHEDULES["linear"](0.25) == 0.25
    assert SCHEDULES["exponential"](0.5) == pytest.approx(1e-5**0.5)
    for schedule in SCHEDULES.values():
        fractions = [schedule(k / 10) for k in range(1, 11)]
        assert fractions == sorted(fractions)
        assert fractions[0] < fractions[-1] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"weight": 0.0},
        {"weight": math.inf},
        {"weight": math.nan},
        {"schedule": "cosine"},
        {"regularizer": "rank"},
        {"moment_batches": 0},
    ],
)
def test_bad_arguments_are_refused_at_once(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        LowRankPrehab(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 6}, "steps was 200 and is 6"),
        ({"weight": 0.2}, "weight was 1.0 and is 0.2"),
        ({"include": "q_proj"}, r"include was None and is \['q_proj'\]"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(settings, message):
    with pytest.raises(CheckpointError, match=rf"other settings \({message}"):
        LowRankPrehab(**settings).load_state_dict(LowRankPrehab().state_dict())


def test_a_checkpoint_of_a_later_version_is_refused():
    callback = LowRankPrehab()
    with pytest.raises(CheckpointError, match="version 2, this release reads 1"):
        callback.load_state_dict(callback.state_dict() | {"version": 2})
