"""The spectra of all layers, shared out among the processes of a team, and what selection sees of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor
from tqdm.auto import tqdm

from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.gathering import Gathering
from zssvd_lightning.selection import Components
from zssvd_lightning.spectrum import Spectrum
from zssvd_lightning.statistics import Moments
from zssvd_lightning.targets import Target
from zssvd_lightning.whitening import METRICS, Whitening, warn_of_jitter


@dataclass
class Decomposition:
    """All layers decomposed, each by one process."""

    owners: Mapping[str, int]
    """Name -> rank of the process that has decomposed the layer, in module order."""
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    """Name -> spectrum, on the CPU, of the layers of this process."""
    components: dict[str, Components] = field(default_factory=dict)
    """Name -> scores of all layers, in module order."""


def svd_work(m: int, n: int) -> float:
    """Floating-point operations of a thin SVD of (m, n), by Householder bidiagonalisation (Golub and Van Loan)."""
    long, short = max(m, n), min(m, n)
    return 6.0 * long * short**2 + 20.0 * short**3


def whitening_work(n: int) -> float:
    """Floating-point operations of the Cholesky factorisation of (n, n)."""
    return n**3 / 3


def share_out(targets: Mapping[str, Target], leaders: Mapping[str, str], size: int) -> list[list[str]]:
    """Layers of each of `size` processes, so that all have about as much to do.

    Layers that share an input stay together. The costliest group goes first, to the process with the least so far.
    """
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(leaders.get(name, name), []).append(name)
    work = {
        leader: whitening_work(targets[leader].shape[1]) + sum(svd_work(*targets[name].shape) for name in names)
        for leader, names in groups.items()
    }
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for leader in sorted(groups, key=lambda leader: -work[leader]):
        least = loads.index(min(loads))
        shares[least] += groups[leader]
        loads[least] += work[leader]
    return shares


def decompose(
    targets: Mapping[str, Target], gathering: Gathering, metric: str, team: Team, progress: bool
) -> Decomposition:
    """Spectra and scores of all layers; one whitening for those that share an input. Collective.

    Processes go through their shares at the same time, layer by layer, and each holds the whole weight and statistics
    of one layer at a time.

    Raises:
        CalibrationError: statistics are missing, not finite or degenerate, or an SVD failed; names the layer.
        ProcessFailedError: that, on another process.
    """
    gathering.share_counts()
    leaders = gathering.moments.leaders
    shares = share_out(targets, leaders, team.size)
    owners = {name: rank for rank, names in enumerate(shares) for name in names}
    found = Decomposition({name: owners[name] for name in targets})
    first = {leaders.get(name, name): name for names in shares for name in reversed(names)}
    own: dict[str, Components] = {}
    jitters: dict[str, float] = {}
    latest: dict[str, Whitening] = {}
    with tqdm(total=len(targets), desc="spectra", unit="layer", disable=not progress) as bar:
        for turn in _turns(shares):
            mine = _take(turn, targets, gathering, metric, team, first, latest)
            if mine is not None:
                name, found.spectra[name], own[name] = mine
                jitters |= {leader: whitening.jitter for leader, whitening in latest.items()}
            bar.update(sum(name is not None for name in turn))
    everyone = {name: scores for theirs in team.gathered(own) for name, scores in theirs.items()}
    found.components = {name: everyone[name] for name in targets}
    everywhere = {name: jitter for theirs in team.gathered(jitters) for name, jitter in theirs.items()}
    if team.rank == 0:
        warn_of_jitter(everywhere)
    return found


def _turns(shares: list[list[str]]) -> Iterator[tuple[str | None, ...]]:
    """The layers that all processes work on at the same time, by rank; None for those that have done theirs."""
    return zip_longest(*shares)


def _take(
    turn: tuple[str | None, ...],
    targets: Mapping[str, Target],
    gathering: Gathering,
    metric: str,
    team: Team,
    first: Mapping[str, str],
    latest: dict[str, Whitening],
) -> tuple[str, Spectrum, Components] | None:
    """Name, spectrum and scores of this process's layer of a turn; what it held whole is gone afterwards. Collective.

    `first` has the first layer to be decomposed of every leader; `latest` the whitening of the layer before by its
    leader, and then of this one, which may share it.
    """
    leaders = gathering.moments.leaders
    brought = [
        gathering.layer_at(rank, name, inputs=name == first.get(leaders.get(name, name)))
        for rank, name in enumerate(turn)
        if name is not None
    ]
    own, name = next(filter(None, brought), None), turn[team.rank]
    mine = None
    with team.together():
        if own is not None and name is not None:
            weight, moments = own
            leader = leaders.get(name, name)
            if leader not in latest:
                latest.clear()
                latest[leader] = METRICS[metric](moments, name)
            mine = (name, *_decompose(targets[name], weight, moments, latest[leader]))
    return mine


def _decompose(target: Target, weight: Tensor, moments: Moments, whitening: Whitening) -> tuple[Spectrum, Components]:
    try:
        spectrum = Spectrum.of(weight, whitening)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CalibrationError(
            f"the SVD of {target.name} {target.shape} failed: {error}; check the weight for NaN and infinite values, "
            "calibrate on more tokens, or add it to ignore"
        ) from error
    delta = spectrum.sensitivities(moments.mean_gradient(target.name))
    return spectrum.to("cpu"), Components(spectrum.sigma.cpu(), delta.cpu())
