"""Share decompositions out over processes by their estimated work."""

from collections.abc import Mapping

from zssvd_lightning.model.targets import Target


def svd_work(m: int, n: int) -> float:
    """Floating-point operations of a thin SVD of (m, n), by eigenvectors of its smaller square (Golub and Van Loan)."""
    long, short = max(m, n), min(m, n)
    return 4.0 * long * short**2 + 9.0 * short**3


def whitening_work(n: int) -> float:
    """Floating-point operations of the Cholesky factorization of (n, n), on either side."""
    return n**3 / 3


def share_out(
    targets: Mapping[str, Target], leaders: Mapping[str, str], size: int, *, outputs: bool = False
) -> list[list[str]]:
    """Layers of each of `size` processes, so that all have about as much to do.

    Layers that share an input stay together. The costliest group goes first, to the process with the least so far.
    With `outputs` there is a Cholesky factorization for the output of each too.
    """
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(leaders.get(name, name), []).append(name)
    work = {
        leader: whitening_work(targets[leader].shape[1])
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
