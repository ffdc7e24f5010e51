"""Rule `equal_energy`: every matrix keeps the same share of its squared singular values."""

from zssvd_lightning.selection.rules import RULES, Rule, of_ranks


def equal_energy(matrices, budget):
    """Find the largest share that the budget allows, by bisection."""
    energy = {name: components.sigma.double().square().cumsum(0) for name, components in matrices.items()}

    def ranks(share):
        reaching = {name: int((total < share * total[-1]).sum()) + 1 for name, total in energy.items()}
        return {name: max(budget.floor(name), rank) for name, rank in reaching.items()}

    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        cost = sum(budget.costs(name)[rank] for name, rank in ranks(share).items())
        low, high = (share, high) if cost <= budget.allowed else (low, share)
    return of_ranks(matrices, budget, ranks(low))


RULES.register("equal_energy", Rule(equal_energy))
