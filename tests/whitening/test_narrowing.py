"""Removal of hidden units against brute force: least squares with and without each unit."""

from itertools import combinations

import pytest
import torch
from support.samplers import rows, second_moment, weight

from zssvd_lightning.whitening.cholesky import Root, Whitening, safe_cholesky
from zssvd_lightning.whitening.narrowing import made_up, removed_units


def whitening(h, p):
    A, B = second_moment(h), second_moment(p)
    return A, B, Whitening(Root(*safe_cholesky(A, "layer")), Root(*safe_cholesky(B, "layer")))


def without(W, A, B, gone):
    """Return the least loss without units, and the weight that has it, by the normal equations of all its entries.

    The loss is `1/2 tr((M E - W)^T B (M E - W) A)`, whose minimum over M is that of a quadratic form in `vec(M)`.
    """
    p, h = W.shape
    kept = [j for j in range(h) if j not in gone]
    E = torch.eye(h, dtype=W.dtype)[kept]
    H = torch.kron(B, E @ A @ E.T)
    M = torch.linalg.solve(H, (B @ W @ A @ E.T).reshape(-1)).reshape(p, len(kept))
    D = M @ E - W
    return 0.5 * float(torch.trace(D.T @ B @ D @ A)), M, kept


@pytest.mark.parametrize("group", [1, 2, 3])
def test_losses_and_weights_are_those_of_least_squares(group):
    W, G = weight(4, 9), weight(4, 9)
    A, B, roots = whitening(9, 4)
    found = removed_units(W, roots, G, group, least=group)
    assert found.widths == (9, *range(8 // group * group, 0, -group))
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist()))
    for width, loss, drift in zip(found.widths, found.losses, found.drifts, strict=True):
        gone = found.order[: 9 - width].tolist()
        least, M, kept = without(W, A, B, gone)
        torch.testing.assert_close(float(loss), least, rtol=1e-6, atol=1e-9)
        made = made_up(W, roots.inputs, torch.tensor(kept))
        torch.testing.assert_close(made, M)
        change = -W.clone()
        change[:, kept] += M
        torch.testing.assert_close(float(drift), float((G * change).sum()))


def test_a_unit_costs_what_optimal_brain_surgeon_says_and_the_cheapest_goes_first():
    W, (A, B, roots) = weight(4, 9).double(), whitening(9, 4)
    P, R = torch.linalg.inv(A), torch.linalg.cholesky(B)
    single = [float(0.5 * (R.T @ W[:, j]).square().sum() / P[j, j]) for j in range(9)]
    for j, loss in enumerate(single):
        torch.testing.assert_close(loss, without(W, A, B, [j])[0])
    found = removed_units(W, roots, torch.zeros_like(W), 1, least=1)
    assert int(found.order[0]) == min(range(9), key=single.__getitem__)
    torch.testing.assert_close(float(found.losses[1]), min(single))


def test_each_unit_is_the_cheapest_beside_those_that_are_gone():
    W, (A, B, roots) = weight(4, 9).double(), whitening(9, 4)
    order = removed_units(W, roots, torch.zeros_like(W), 1, least=1).order.tolist()
    for count in range(len(order)):
        gone = order[:count]
        losses = {j: without(W, A, B, [*gone, j])[0] for j in range(9) if j not in gone}
        assert order[count] == min(losses, key=losses.__getitem__)


def test_a_pair_of_equal_units_goes_once():
    H = rows(200, 7)
    H = torch.cat([H, H[:, :1] + 1e-4 * rows(200, 1)], 1)  # the last is about the first
    A, W = H.T @ H / len(H), weight(3, 8)
    found = removed_units(W, Whitening(Root(*safe_cholesky(A, "layer"))), torch.zeros_like(W), 2, least=2)
    assert len({0, 7} & set(found.order[:2].tolist())) == 1
    losses = {pair: without(W, A, torch.eye(3, dtype=W.dtype), pair)[0] for pair in combinations(range(8), 2)}
    assert losses[0, 7] > 10 * float(found.losses[1])
    torch.testing.assert_close(float(found.losses[1]), min(losses.values()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("S", [None, torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0, 0.5]).double()])
def test_independent_units_are_dropped_as_they_are(S):
    W, roots = weight(3, 6), Whitening(Root(S))
    found = removed_units(W, roots, torch.zeros_like(W), 1, least=1)
    scales = torch.ones(6).double() if S is None else S
    losses = 0.5 * (W * scales).square().sum(0)
    assert found.order.tolist() == losses.argsort()[:5].tolist()
    torch.testing.assert_close(found.losses[1:], losses.sort().values[:5].cumsum(0))
    units = torch.tensor([1, 4])
    assert torch.equal(made_up(W, roots.inputs, units), W[:, units])


def test_units_that_are_gone_are_taken_out_of_the_matrices_without_a_change():
    """A width at which the matrices shrink several times on the way."""
    W, (A, B, roots) = weight(5, 64).double(), whitening(64, 5)
    found = removed_units(W, roots, torch.zeros_like(W), 4, least=4)
    assert found.widths == tuple(range(64, 0, -4))
    for width in (44, 20, 4):
        gone = found.order[: 64 - width].tolist()
        torch.testing.assert_close(float(found.losses[found.widths.index(width)]), without(W, A, B, gone)[0])
