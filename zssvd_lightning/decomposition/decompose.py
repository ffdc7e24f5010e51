"""The spectra of all layers, shared out among the processes of a team, and what selection sees of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.decomposition.work_sharing import share_out
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.selection.components import Components
from zssvd_lightning.whitening.cholesky import Root, Whitening, warn_of_jitter
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.rounding import Importance, importance, rounding_by_component, rounding_of_dense
from zssvd_lightning.whitening.spectrum import Spectrum

T = TypeVar("T")


@dataclass(frozen=True)
class Decomposition:
    """All layers decomposed, each by one process."""

    owners: Mapping[str, int]
    """Name -> rank of the process that has decomposed the layer."""
    spectra: Mapping[str, Spectrum]
    """Name -> spectrum, on the CPU, of the layers of this process."""
    components: Mapping[str, Components]
    """Name -> scores of all layers, in module order."""
    importances: Mapping[str, Importance]
    """Name -> importance of each output and input, for the layers there are statistics of it."""

    def everywhere(self, targets: Mapping[str, Target], team: Team) -> "Decomposition":
        """The same with the spectra of all layers on each process, where the layers are. Collective."""
        spectra = {}
        for name, target in targets.items():
            own, owner, sigma = self.spectra.get(name), self.owners[name], self.components[name].sigma
            like = target.weight.new_empty(0, dtype=sigma.dtype)
            (m, n), r = target.shape, len(sigma)
            left = team.from_owner(owner, None if own is None else own.left, (m, r), like)
            right = team.from_owner(owner, None if own is None else own.right, (r, n), like)
            spectra[name] = Spectrum(left, sigma.to(like), right)
        return replace(self, owners=dict.fromkeys(targets, 0), spectra=spectra)

    def state_dict(self, team: Team) -> dict[str, Any]:
        """Of spectra that are everywhere: plain types and tensors, as the team saves them. Collective."""
        to_save = {}
        for name, spectrum in self.spectra.items():
            left = team.weight_to_save(spectrum.left, len(spectrum.left))
            right = team.weight_to_save(spectrum.right, len(spectrum.right))
            if left is not None and right is not None:
                components = {f.name: getattr(self.components[name], f.name) for f in fields(Components)}
                to_save[name] = {"left": left, "right": right, "components": components}
        return to_save

    @classmethod
    def of_state(cls, state: Mapping[str, Any], targets: Mapping[str, Target]) -> "Decomposition":
        """From a `state_dict`, everywhere."""
        components = {name: Components(**saved["components"]) for name, saved in state.items()}
        spectra = {
            name: Spectrum(saved["left"], components[name].sigma, saved["right"]).to(targets[name].weight.device)
            for name, saved in state.items()
        }
        return cls(dict.fromkeys(spectra, 0), spectra, components, {})


def decompose(
    targets: Mapping[str, Target],
    gathering: StatisticsCollector,
    metric: str,
    team: Team,
    progress: bool,
    *,
    weigh: bool = False,
    round_off: bool = False,
    lengths: Mapping[str, float] | None = None,
) -> Decomposition:
    """Spectra and scores of all layers; one whitening for those that share an input. Collective.

    Processes go through their shares at the same time, layer by layer. Each holds the whole weight and statistics of
    one layer at a time, the latest whitening, and on the CPU the spectra of its share.

    Args:
        targets: the layers.
        gathering: statistics of them.
        metric: by its name in `whitening.METRICS`.
        team: the processes that compress the model together.
        progress: whether to draw a bar.
        weigh: whether to find the importance of outputs and inputs too.
        round_off: whether to find what keeping components in 8 bits would cost.
        lengths: how far each weight goes along its gradient first; see `Spectrum.of`.

    Raises:
        CalibrationError: statistics are missing, not finite or degenerate, or an SVD failed; names the layer.
        ProcessFailedError: that, on another process.
    """
    worker = _Decomposer(targets, gathering, metric, team, weigh=weigh, round_off=round_off, lengths=lengths)
    shares = worker.take_all("spectra", progress)
    components = _of_all(team, worker.components)
    jitters = _of_all(team, worker.jitters)
    if team.rank == 0:
        warn_of_jitter(jitters)
    owners = {name: rank for rank, names in enumerate(shares) for name in names}
    importances = {name: Importance(*pair) for name, pair in _of_all(team, worker.importances).items()}
    return Decomposition(owners, worker.spectra, {name: components[name] for name in targets}, importances)


def gradient_squares(
    targets: Mapping[str, Target], gathering: StatisticsCollector, metric: str, team: Team, progress: bool
) -> dict[str, float]:
    """`<H, H>` of all layers, H being the whitened gradient `R^-1 G L^-T`. Collective.

    Takes the arguments of `decompose`, and raises what it raises.
    """
    worker = _Measurer(targets, gathering, metric, team)
    worker.take_all("gradients", progress)
    return _of_all(team, worker.squares)


class _Worker(ABC):
    """One process at its share of the layers."""

    def __init__(self, targets: Mapping[str, Target], gathering: StatisticsCollector, metric: str, team: Team) -> None:
        self.jitters: dict[str, float] = {}
        self._targets = targets
        self._gathering = gathering
        self._metric = METRICS[metric]
        self._team = team
        self._started: set[str] = set()
        self._inputs: tuple[str, Root] | None = None

    def take_all(self, title: str, progress: bool) -> list[list[str]]:
        """Goes through all layers, and says which were whose share. Collective."""
        self._gathering.complete()
        leaders, outputs = self._gathering.moments.leaders, self._metric.needs_outputs
        shares = share_out(self._targets, leaders, self._team.size, outputs=outputs)
        with tqdm(total=len(self._targets), desc=title, unit="layer", disable=not progress) as bar:
            for turn in zip_longest(*shares):
                self.take(turn)
                bar.update(sum(name is not None for name in turn))
        return shares

    def take(self, turn: tuple[str | None, ...]) -> None:
        """Does this process's layer while the others do theirs. Collective.

        What was held whole for it is gone afterwards, but for the side of the input, which the next layer may share.

        Args:
            turn: the layers by rank; None for processes that have done theirs.
        """
        own = None
        for rank, name in enumerate(turn):
            if name is not None:
                leader = self._gathering.moments.leaders.get(name, name)
                layer = self._gathering.layer_at(rank, name, inputs=leader not in self._started)
                self._started.add(leader)
                own = (name, leader, *layer) if layer is not None else own
        with self._team.together():
            if own is not None:
                self._do(*own)

    def _do(self, name: str, leader: str, weight: Tensor, moments: Moments) -> None:
        if self._inputs is None or self._inputs[0] != leader:
            self._inputs = None
            self._inputs = leader, self._metric.inputs(moments, name)
            self.jitters[leader] = self._inputs[1].jitter
        whitening = Whitening(self._inputs[1], self._metric.outputs(moments, name))
        self.jitters[f"the output of {name}"] = whitening.outputs.jitter
        self._do_whitened(name, weight, moments, whitening)

    @abstractmethod
    def _do_whitened(self, name: str, weight: Tensor, moments: Moments, whitening: Whitening) -> None:
        """Does one layer."""


class _Measurer(_Worker):
    """Finds the squares of whitened gradients."""

    def __init__(self, targets: Mapping[str, Target], gathering: StatisticsCollector, metric: str, team: Team) -> None:
        super().__init__(targets, gathering, metric, team)
        self.squares: dict[str, float] = {}

    def _do_whitened(self, name: str, weight: Tensor, moments: Moments, whitening: Whitening) -> None:
        G = moments.mean_gradient(name).to(accumulated(weight.dtype))
        self.squares[name] = float(whitening.whiten_gradient(G).square().sum())


class _Decomposer(_Worker):
    """Finds spectra and scores."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        gathering: StatisticsCollector,
        metric: str,
        team: Team,
        *,
        weigh: bool,
        round_off: bool,
        lengths: Mapping[str, float] | None,
    ) -> None:
        super().__init__(targets, gathering, metric, team)
        self.spectra: dict[str, Spectrum] = {}
        self.components: dict[str, Components] = {}
        self.importances: dict[str, tuple[Tensor, Tensor]] = {}
        self._weigh = weigh
        self._round_off = round_off
        self._lengths = lengths

    def _do_whitened(self, name: str, weight: Tensor, moments: Moments, whitening: Whitening) -> None:
        G = moments.mean_gradient(name)
        along = () if self._lengths is None else (G, self._lengths[name])
        spectrum = spectrum_of(self._targets[name], weight, whitening, *along)
        delta = spectrum.sensitivities(G)
        if self._weigh:
            H = whitening.whiten_gradient(G)
            found = importance(whitening.inputs.diagonal(H.shape[1]).to(H), H)
            self.importances[name] = found.outputs.cpu(), found.inputs.cpu()
        rounding, rounding_dense = None, None
        if self._round_off:
            rounding = rounding_by_component(spectrum, whitening).cpu()
            rounding_dense = rounding_of_dense(weight, whitening)
        self.spectra[name] = spectrum.to("cpu")
        self.components[name] = Components(spectrum.sigma.cpu(), delta.cpu(), rounding, rounding_dense)


def _of_all(team: Team, own: Mapping[str, T]) -> dict[str, T]:
    """What every process has for its layers, in one dictionary. Collective."""
    return {name: value for theirs in team.gathered(own) for name, value in theirs.items()}


def spectrum_of(
    target: Target, weight: Tensor, whitening: Whitening, G: Tensor | None = None, length: float = 0.0
) -> Spectrum:
    """As `Spectrum.of`, of a weight for the layer `target`. Raises CalibrationError, which names it."""
    try:
        return Spectrum.of(weight, whitening, G, length)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CalibrationError(
            f"the SVD of {target.name} {target.shape} failed: {error}; check the weight for NaN and infinite values, "
            "calibrate on more tokens, or add it to ignore"
        ) from error
