"""Removal of hidden units in front of a layer: in which order they go, what that costs, and how the layer makes up.

A layer `y = W h` reads h hidden units, whose second moment is A. Without the units D, the others (S) approximate their
outputs best by least squares, `h_D ~ A_DS A_SS^-1 h_S`. The layer then has the weight `M = W A_:S A_SS^-1` (p, w),
which is the same for every metric of the outputs. With the root R of the output-gradient second moment, the increase
of the loss is

    1/2 ||R^T (M E - W) L||^2 = 1/2 tr(V_D (P_DD)^-1 V_D^T),    V = R^T W,    P = A^-1,

where E puts the remaining units in their places. For a single unit j that is `1/2 |R^T w_j|^2 / P_jj`, as in Optimal
Brain Surgeon (Hassibi and Stork 1993); the least-squares fit is the Nystrom approximation with which MoDeGPT removes
hidden units (arXiv 2408.09632). After units D are gone, `V - V_D P_DD^-1 P_D:` and `P - P_:D P_DD^-1 P_D:` take the
places of V and P, and the increases of one removal after another add up exactly.

Shapes: W (p, h), A and L (h, h), R (p, p), w remaining units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning._numerics import exact_products, in_float64
from zssvd_lightning.whitening.cholesky import Root, Whitening
from zssvd_lightning.whitening.shrinkage import shrinkage

CANDIDATES = 4
"""Units that are looked at for each that goes in a group: those whose removal alone would cost least."""

CROWDED = 0.75
"""Part of the units that must be left in the matrices; else those that are gone are taken out of them."""


class Removed(NamedTuple):
    """Hidden units in the order in which they go, group by group."""

    order: Tensor
    """Units (g,) that go, the first one first, int64 on the CPU."""
    widths: tuple[int, ...]
    """Number of units that remain after each group, beginning with h; then multiples of the size of a group."""
    losses: Tensor
    """Increase of the loss at each of the widths (nats), float64 on the CPU."""
    drifts: Tensor
    """First-order change of the loss at each of the widths (nats), float64 on the CPU."""


@torch.no_grad()
def removed_units(W: Tensor, whitening: Whitening, G: Tensor, group: int, least: int) -> Removed:
    """Return the order in which hidden units in front of a layer go, and what that costs.

    In each group, the unit goes that costs least beside those that are gone, out of `CANDIDATES` times as many as the
    group has.

    Args:
        W: weight (p, h) of the layer that reads the units.
        whitening: roots of the second moments of the layer; that of its inputs is a triangular matrix.
        G: mean gradient (p, h) of the loss by the weight.
        group: number of units that go at a time.
        least: number of units that must remain, a multiple of `group`.
    """
    h = W.shape[1]
    with exact_products():
        P = precision(whitening.inputs, h)
        M, G = in_float64(W).to(P, copy=True), in_float64(G).to(P)
        V = whitening.outputs.times(M.T).T.clone()
        there, alive = torch.arange(h, device=P.device), torch.ones(h, dtype=torch.bool, device=P.device)
        order, losses, drifts, widths = list[Tensor](), [0.0], [0.0], [h]
        while widths[-1] > least:
            D = _cheapest(V, P, alive, widths[-1] % group or group)
            widths.append(widths[-1] - len(D))
            PD, inverse = P[D], torch.linalg.inv(P[D][:, D])
            losses.append(losses[-1] + 0.5 * float(((V[:, D] @ inverse) * V[:, D]).sum()))
            step = -(M[:, D] @ inverse) @ PD
            drifts.append(drifts[-1] + float((G * step).sum()))
            V -= (V[:, D] @ inverse) @ PD
            M += step
            P -= P[:, D] @ inverse @ PD
            order.append(there[D])
            alive[D] = False
            if widths[-1] <= CROWDED * len(alive):
                there, P = there[alive], P[alive][:, alive]
                V, M, G, alive = V[:, alive], M[:, alive], G[:, alive], alive[alive]
    gone = torch.cat(order).cpu() if order else torch.zeros(0, dtype=torch.long)
    return Removed(gone, tuple(widths), *torch.tensor([losses, drifts], dtype=torch.float64))


def precision(inputs: Root, h: int) -> Tensor:
    """Return `P = (L L^T)^-1` (h, h) in float64."""
    if inputs.S is None:
        return torch.eye(h, dtype=torch.float64)
    S = in_float64(inputs.S)
    return S.square().reciprocal().diag() if S.ndim == 1 else torch.cholesky_inverse(S)


@torch.no_grad()
def made_up(W: Tensor, inputs: Root, units: Tensor) -> Tensor:
    """Return the weight `M = W A_:S A_SS^-1` (p, w), in the type of W, that reads the remaining units alone.

    Args:
        W: weight (p, h).
        inputs: root L of the second moment A of the hidden units.
        units: remaining units S (w,).
    """
    if inputs.S is None or inputs.S.ndim == 1:  # the units are independent
        return W[:, units.to(W.device)].clone()
    with exact_products():
        L = in_float64(inputs.S)
        rows = L[units.to(L.device)]  # A_SS = rows rows^T, A_:S = L rows^T
        root = torch.linalg.cholesky(rows @ rows.T)
        return torch.cholesky_solve(rows @ (L.T @ in_float64(W).to(L).T), root).T.to(W)


def shrunk_to_diagonal(A: Tensor, tokens: float) -> Tensor:
    """Return the second moment of hidden units as far as T tokens show that it is not diagonal; see `shrinkage`.

    The units that remain make up for the others by what A says of them together. Of few tokens it says too much: a fit
    to it makes the loss on other tokens worse.
    """
    diagonal = A.diagonal().diag()
    return torch.lerp(A, diagonal, shrinkage(A, tokens, diagonal))


def _cheapest(V: Tensor, P: Tensor, alive: Tensor, group: int) -> Tensor:
    """Return the units (group,) that go next: one after another out of those that cost least alone."""
    costs = (V.square().sum(0) / P.diagonal()).where(alive, torch.inf)
    C = costs.topk(min(CANDIDATES * group, int(alive.sum())), largest=False).indices
    Q, VV = P[C][:, C].cpu(), (V[:, C].T @ V[:, C]).cpu()
    taken = list[int]()
    free = torch.ones(len(C), dtype=torch.bool)
    for _ in range(group):
        scores = (VV.diagonal() / Q.diagonal()).where(free, torch.inf)
        j = int(scores.argmin())
        taken.append(j)
        free[j] = False
        q = Q[j] / Q[j, j]
        VV = VV - torch.outer(q, VV[j]) - torch.outer(VV[:, j], q) + VV[j, j] * torch.outer(q, q)
        Q = Q - torch.outer(q, Q[j])
    return C[torch.tensor(taken, device=C.device)]
