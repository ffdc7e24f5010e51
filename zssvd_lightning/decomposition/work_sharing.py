"""Distribution of decompositions over processes by their estimated work."""

from collections.abc import Mapping

from zssvd_lightning.model.targets import Target


def svd_work(m: int, n: int) -> float:
    """Return the floating-point operations of a thin SVD of an (m, n) matrix through its smaller Gram matrix.

    The count is that of Golub and Van Loan.
    """
    long, short = max(m, n), min(m, n)
    return 4.0 * long * short**2 + 9.0 * short**3


def whitening_work(n: int) -> float:
    """Return the floating-point operations of one Cholesky factorization of an (n, n) second moment."""
    return n**3 / 3


def share_out(
    targets: Mapping[str, Target], leaders: Mapping[str, str], size: int, *, outputs: bool = False
) -> list[list[str]]:
    """Return the layers that each of `size` processes decomposes, so that all have about the same work.

    Layers that share an input stay together. Groups are assigned in order of decreasing work, each to the process with
    the least work so far.

    Args:
        targets: layers by name.
        leaders: layer -> the layer under whose name their shared second moment is stored.
        size: number of processes.
        outputs: True if the output side of each layer also takes a Cholesky factorization.
    """
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(leaders.get(name, name), []).append(name)
    work = {
        leader: whitening_work(targets[names[0]].shape[1])
        + sum(svd_work(*targets[name].shape) + outputs * whitening_work(targets[name].shape[0]) for name in names)
        for leader, names in groups.items()
    }
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for leader in sorted(groups, key=lambda leader: -work[leader]):
        least = loads.index(min(loads))
        shares[least] += groups[leader]
        loads[least] += work[leader]
    return shares
