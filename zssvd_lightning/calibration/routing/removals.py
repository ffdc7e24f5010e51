"""Estimated change of the loss if an expert were removed, from the calibration batches.

Shapes: N tokens, n features, E experts, K experts for each token.

Without an expert, its tokens go to the experts that the router chooses then, with the weights that it gives them. With
`c = <d, change of the output>` at each token, where d is the gradient of the loss by the output of all experts, the
change of the mean loss is estimated by the sum of c over the tokens and, to second order, half the sum of its square,
both over the number of loss terms. The second is the Fisher estimate that metric `two_sided` makes of a change of a
weight, but without the assumption that inputs and gradients are independent.
"""

import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zssvd_lightning._numerics import exact_products
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.layers.apart.experts import Expert, ExpertList
from zssvd_lightning.layers.apart.removed import Routing, forgotten_by, removed_from, run_without
from zssvd_lightning.model.apart.routers import Routed
from zssvd_lightning.selection.removals import Removal
from zssvd_lightning.whitening.moments import Moments

if TYPE_CHECKING:
    from zssvd_lightning.calibration.collector import StatisticsCollector

logger = logging.getLogger(__name__)

Weights = Callable[[], tuple[float, float]]
"""Function that returns the weights of a gradient in the first-order and in the second-order sum."""


def watch_removals(
    model: nn.Module, routed: Collection[Routed], weights: Weights, into: Moments, hooks: ExitStack
) -> None:
    """Add the changes of the loss by removing each expert to `into`, until `hooks` are closed."""
    for each in routed:
        _watch(each, each.experts_in(model), each.router_in(model), weights, into, hooks)


def _watch(
    routed: Routed, experts: ExpertList, router: nn.Module, weights: Weights, into: Moments, hooks: ExitStack
) -> None:
    numbers = routed.may_go({*removed_from(experts), *forgotten_by(router)})
    count, arguments = len(routed.layers), inspect.signature(experts.forward)
    asked: list[tuple[Tensor, Routing]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        asked[:] = [((*args, *kwargs.values())[0].detach(), Routing(*output))]

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x, chosen, shares = (each.detach() for each in arguments.bind(*args, **kwargs).arguments.values())
        other = not asked or not _agree(asked[0][1], chosen, shares, count)
        tokens = x if other else asked[0][0]

        def see(gradient: Tensor) -> None:
            first, second = weights()
            if other:
                into.add_removals(routed.name, torch.full((2, count), torch.nan, device=x.device))
            elif first or second:
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False), exact_products():
                    c = changes_of_loss(experts, router, numbers, tokens, x, chosen, shares, gradient)
                into.add_removals(routed.name, torch.stack([first * c.sum(0), (second * c).square().sum(0)]))

        if output.requires_grad:
            output.register_hook(see)  # type: ignore[no-untyped-call]

    hooks.callback(router.register_forward_hook(note, prepend=True, with_kwargs=True).remove)
    hooks.callback(experts.register_forward_hook(watch, with_kwargs=True).remove)


def changes_of_loss(
    experts: ExpertList,
    router: nn.Module,
    numbers: Collection[int],
    asked: Tensor,
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    D: Tensor,
) -> Tensor:
    """Return the product of the gradient with the change of the output, if an expert were removed, by token (N, E).

    Hooks of router and experts do not run.

    Args:
        experts: the experts.
        router: their router.
        numbers: experts that could be removed.
        asked: input (N, n) of the router.
        x: input (N, n) of the experts.
        chosen: experts (N, K) of each token.
        shares: weights (N, K) of these experts.
        D: gradient (N, n) of the loss by the output.
    """
    count, gone = len(experts.experts), forgotten_by(router)
    asked, x = asked.reshape(-1, asked.shape[-1]).to(_dtype(router)), x.to(_dtype(experts))
    present = _by_expert(chosen, shares, count)
    needed, without = present != 0, dict[int, tuple[Tensor, Tensor]]()
    for number in numbers:
        rows = (chosen == number).any(1).nonzero().flatten()
        if len(rows):
            routing = Routing(*run_without(router, {*gone, number}, count, asked[rows]))
            without[number] = rows, _by_expert(routing.chosen, routing.weights, count)
            needed[rows] |= without[number][1] != 0
    products = torch.zeros_like(present)
    for number, expert in enumerate(experts.experts):
        rows = needed[:, number].nonzero().flatten()
        if len(rows):
            products[rows, number] = (_output(experts, expert, x[rows]) * D[rows]).sum(-1).to(products)
    changes = torch.zeros_like(present)
    for number, (rows, weights) in without.items():
        changes[rows, number] = ((weights - present[rows]) * products[rows]).sum(1)
    return changes


def possible_removals(gathering: "StatisticsCollector", layers: Mapping[str, Any], team: Team) -> list[Removal]:
    """Return the experts that may be removed, with the estimates of the statistics; after `complete`. Collective.

    Lists that the batches have not reached have none, and neither have those whose experts do not get the weights that
    the router returns, which the log names.

    Args:
        gathering: the statistics.
        layers: layers that selection decides on. An expert is a candidate if all of its layers are among them.
        team: processes that gathered the statistics.

    Raises:
        CalibrationError: the statistics have no estimates.
    """
    found, terms = list[Removal](), gathering.moments.loss_terms
    for each in gathering.routed:
        experts = each.experts_in(gathering.model)
        gone = {*removed_from(experts), *forgotten_by(each.router_in(gathering.model))}
        own = _sums(each, gathering.moments, next(experts.parameters()).device)
        first, squares = team.over_batches(own).double().cpu()
        may_go = {number: most for number, most in each.may_go(gone).items() if layers.keys() >= {*each.layers[number]}}
        if squares.isnan().any():
            if team.rank == 0:
                logger.warning(
                    "no expert of %s is removed: in a batch, they got other experts or weights than their router "
                    "returned, so that it is not known what they would get without one",
                    each.name,
                )
            continue
        if not squares.any():
            if any(gathering.moments.tokens.get(name) for number in may_go for name in each.layers[number]):
                raise CalibrationError(
                    f"the statistics tell nothing of removing experts of {each.name}: they are of a calibration "
                    "without remove_experts, or the loss does not depend on these experts, or this loss is flat at "
                    "them; calibrate with remove_experts=True"
                )
            continue
        for number, most in may_go.items():
            losses = float(first[number]) / terms, float(squares[number]) / 2 / terms
            found.append(Removal(each.layers[number], *losses, (each.name, each.group_of(number)), most))
    return found


def removals_to_save(
    routed: Collection[Routed], moments: Moments, team: Team, device: torch.device
) -> dict[str, Tensor]:
    """Return `Moments.removal_sums` over all batches, in the form the team saves. Collective."""
    found = {each.name: team.total_to_save(_sums(each, moments, device)) for each in routed}
    return {name: sums for name, sums in found.items() if sums is not None}


def own_removals(state: Mapping[str, Any], team: Team, device: torch.device) -> dict[str, Tensor]:
    """Return this process's part of the `removal_sums` in the state of `Moments`."""
    found = {name: team.own_total(sums) for name, sums in state.get("removal_sums", {}).items()}
    return {name: sums.to(device, copy=True) for name, sums in found.items() if sums is not None}


def _sums(routed: Routed, moments: Moments, device: torch.device) -> Tensor:
    """Return the sums (2, E) over the batches of this process."""
    own = moments.removal_sums.get(routed.name)
    return torch.zeros(2, len(routed.layers), device=device) if own is None else own


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the type of the weights of a module, which autocast may have given inputs of another."""
    return next(module.parameters()).dtype


def _agree(routing: Routing, chosen: Tensor, shares: Tensor, count: int) -> bool:
    """Return whether experts and weights (N, K) are those that a router has returned, up to the precision of a type."""
    if routing.chosen.shape != chosen.shape:
        return False
    found, expected = _by_expert(chosen, shares, count), _by_expert(routing.chosen, routing.weights.detach(), count)
    return torch.allclose(found, expected, rtol=torch.finfo(shares.dtype).eps ** 0.5, atol=1e-6)


def _by_expert(chosen: Tensor, shares: Tensor, count: int) -> Tensor:
    """Return the weight of each expert (N, E), which is 0 for those that a token does not get."""
    weights = shares.new_zeros(len(chosen), count + 1, dtype=torch.float32)  # a number E stands for no expert
    return weights.scatter_add(1, chosen, shares.float())[:, :count]


def _output(experts: ExpertList, expert: Expert, x: Tensor) -> Tensor:
    """Return the output (t, n) of an expert for x (t, n), without hooks and weights."""
    first: Any = expert.gate_up_proj if hasattr(expert, "gate_up_proj") else expert.up_proj
    output: Tensor = expert.down_proj.forward(experts.activation(first.forward(x)))
    return experts.post_expert_norm.forward(output) if experts.has_post_expert_norm else output
