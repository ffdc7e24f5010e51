import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import ConfigError, NonFiniteError
from zssvd_lightning.prehab import (
    REGULARIZERS,
    SCHEDULES,
    LowRankPrehab,
    Term,
    mean_term,
    nuclear_norm,
    stable_rank,
)
from zssvd_lightning.targets import Target

SHAPES = [(7, 5), (5, 7), (6, 6), (9, 2)]


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_gradient_is_that_of_finite_differences(name, shape):
    W, L = layer(*shape, seed=1)
    kept, direction = REGULARIZERS[name].kept(L), layer(*shape, seed=2)[0]
    evaluate = nuclear_norm if name == "nuclear" else converged
    there, back = (evaluate(W + step * direction, kept).value for step in (1e-5, -1e-5))
    expected = (evaluate(W, kept).gradient * direction).sum()
    torch.testing.assert_close((there - back) / 2e-5, expected, rtol=1e-7, atol=1e-8)


def test_the_weights_are_whitened_by_the_inputs():
    """Inputs 3 times as long along the second axis, by hand: `W L` has the singular values 1 and 6, W has 1 and 2."""
    W, L = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.diag(torch.tensor([1.0, 3.0])).double()
    assert float(converged(W, L @ L.T).value) == pytest.approx(37 / 36)
    assert float(nuclear_norm(W, L).value) == pytest.approx(7)
    assert float(converged(W, torch.eye(2).double()).value) == pytest.approx(5 / 4)


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
    A = torch.eye(4)
    found = stable_rank(torch.zeros(3, 4), A)
    assert float(found.value) == 0
    assert not found.gradient.any()
    W = torch.randn(3, 4)
    torch.testing.assert_close(stable_rank(W, A, found.u).value, stable_rank(W, A).value, rtol=0.5, atol=0)
    assert float(stable_rank(W, A, found.u).value) <= 3


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (200, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_iterations_are_enough_and_few_more_follow_the_weights(shape, seed):
    W, L = layer(*shape, seed=seed)
    W, L = W.float(), L.float()
    found = stable_rank(W, L @ L.T)
    for step in range(20):
        true = by_decomposition("stable_rank", W, L)[0]
        torch.testing.assert_close(found.value, true, rtol=1e-2, atol=0)
        W = W + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(step))
        found = stable_rank(W, L @ L.T, found.u)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_vector_that_has_not_converged_errs_to_the_side_of_a_higher_rank(shape):
    W, L = layer(*shape)
    U, sigma, _ = torch.linalg.svd(W @ L)
    true = (sigma.square().sum() / sigma[0].square()).item()
    for column in range(len(W)):  # the last ones of a tall W are in its left null space
        found = stable_rank(W, L @ L.T, U[:, column])
        assert true * (1 - 1e-12) <= float(found.value) <= min(shape) * (1 + 1e-12)
        assert torch.isfinite(found.gradient).all()
    assert float(stable_rank(W, L @ L.T, U[:, 1]).value) > true * 1.01


def test_the_start_takes_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    first, second = (stable_rank(*map(torch.Tensor.float, layer(7, 5))).u for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)


def targets_of(*modules):
    return {f"layers.{k}": Target(f"layers.{k}", module) for k, module in enumerate(modules)}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_mean_over_layers_that_share_an_input_and_gradients_where_weights_are_stored(name):
    W, L = layer(7, 5)
    linear, stored_turned = nn.Linear(5, 7).double(), Conv1D(7, 5).double()
    linear.weight.data, stored_turned.weight.data = W.clone(), 2 * W.T.clone()
    targets, vectors = targets_of(linear, stored_turned), {}
    leaders, whitening = dict.fromkeys(targets, "layers.0"), {"layers.0": REGULARIZERS[name].kept(L)}
    for _ in range(200):
        value = mean_term(targets, REGULARIZERS[name], leaders, whitening, vectors)
    (3 * value).backward()
    (one, gradient), (other, turned) = by_decomposition(name, W, L), by_decomposition(name, 2 * W, L)
    torch.testing.assert_close(value.detach(), (one + other) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(linear.weight.grad, 1.5 * gradient, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(stored_turned.weight.grad, 1.5 * turned.T, rtol=1e-7, atol=1e-10)
    assert vectors.keys() == (targets.keys() if name == "stable_rank" else set())


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_is_computed_in_float32_under_autocast_and_for_bfloat16_weights(name):
    W, L = layer(60, 50)
    modules = [nn.Linear(50, 60) for _ in range(2)]
    modules[0].weight.data, modules[1].weight.data = W.float().bfloat16().float(), W.float().bfloat16()
    whitening = {"layers.0": REGULARIZERS[name].kept(L).float()}
    values = []
    for module in modules:
        with torch.autocast("cpu", torch.bfloat16):
            values.append(
                mean_term(targets_of(module), REGULARIZERS[name], {"layers.0": "layers.0"}, whitening, {}).detach()
            )
    exact = by_decomposition(name, modules[0].weight.data.double(), L)[0]
    assert [value.dtype for value in values] == [torch.float32] * 2
    assert values[0] == values[1]
    assert float(values[0]) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_out_of_range_are_an_error_that_names_the_layer(name, bad):
    modules = [nn.Linear(5, 7) for _ in range(3)]
    modules[1].weight.data[2, 3] = bad
    targets, whitening = targets_of(*modules), {"layers.0": torch.eye(5)}
    with pytest.raises(NonFiniteError, match=r"of layers\.1 \(7, 5\) is nan: its weights"):
        mean_term(targets, REGULARIZERS[name], dict.fromkeys(targets, "layers.0"), whitening, {})


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
        {"weight": -1.0},
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
