"""Spectra of all layers, computed by the processes of a team, and the component scores that selection uses."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning._resources import step_shown
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.decomposition.work_sharing import share_out
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.selection.components import Components
from zssvd_lightning.whitening.cholesky import HARMLESS_JITTER, IDENTITY, Root, Whitening, safe_cholesky, warn_of_jitter
from zssvd_lightning.whitening.kept_roots import KeptRoots
from zssvd_lightning.whitening.metrics import Metric
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.narrowing import Removed, removed_units, shrunk_to_diagonal
from zssvd_lightning.whitening.rounding import Importance, importance, rounding_by_component, rounding_of_dense
from zssvd_lightning.whitening.spectrum import NO_STEP, Spectrum, Step


@dataclass(frozen=True)
class Decomposition:
    """Decomposition of all layers, each computed by one process."""

    owners: Mapping[str, int]
    """Name -> rank of the process that decomposed the layer."""
    spectra: Mapping[str, Spectrum]
    """Name -> spectrum on the CPU, for the layers of this process; with `highest`, its largest components alone."""
    components: Mapping[str, Components]
    """Name -> component scores, for all layers in module order."""
    importances: Mapping[str, Importance]
    """Name -> importance of outputs and inputs; empty unless it was requested."""
    jitters: Mapping[str, float] = field(default_factory=dict)
    """Name -> jitter that the second moment needed; see `Whitener`."""
    removed: Mapping[str, Removed] = field(default_factory=dict)
    """Name of a layer that reads a hidden width -> the order in which its units could go."""

    def everywhere(self, layers: LayerSet, spectra: MutableMapping[str, Spectrum] | None = None) -> "Decomposition":
        """Return a copy with the spectra of all layers on every process, on the layers' devices. Collective.

        Args:
            layers: the layers and the processes that hold them.
            spectra: empty mapping that stores the spectra; None for a dictionary.
        """
        spectra, team = {} if spectra is None else spectra, layers.team
        for name, target in layers.items():
            own, owner, sigma = self.spectra.get(name), self.owners[name], self.components[name].sigma
            like = target.weight.new_empty(0, dtype=sigma.dtype)
            (m, n), r = target.shape, len(sigma)
            left = team.from_owner(owner, None if own is None else own.left, (m, r), like)
            right = team.from_owner(owner, None if own is None else own.right, (r, n), like)
            spectra[name] = Spectrum(left, sigma.to(like), right)
        return replace(self, owners=dict.fromkeys(layers, 0), spectra=spectra)

    def state_dict(self, layers: LayerSet) -> dict[str, Any]:
        """Return plain types and tensors in the form the team saves. Call it after `everywhere`. Collective."""
        to_save, team = {}, layers.team
        for name, spectrum in self.spectra.items():
            left = team.weight_to_save(spectrum.left, len(spectrum.left))
            right = team.weight_to_save(spectrum.right, len(spectrum.right))
            if left is not None and right is not None:
                components = {f.name: getattr(self.components[name], f.name) for f in fields(Components)}
                to_save[name] = {"left": left, "right": right, "components": components}
        return to_save

    @classmethod
    def of_state(
        cls,
        state: Mapping[str, Any],
        targets: Mapping[str, Target],
        spectra: MutableMapping[str, Spectrum] | None = None,
    ) -> "Decomposition":
        """Return the decomposition in a `state_dict`, with the spectra of all layers on every process.

        Arguments: see `everywhere`.
        """
        spectra = {} if spectra is None else spectra
        components = {name: Components(**saved["components"]) for name, saved in state.items()}
        for name, saved in state.items():
            whole = Spectrum(saved["left"], components[name].sigma, saved["right"])
            spectra[name] = whole.to(targets[name].weight.device)
        return cls(dict.fromkeys(spectra, 0), spectra, components, {})


class LayerAtOwner(NamedTuple):
    """Weight and statistics of a layer, gathered at the process that decomposes it."""

    name: str
    leader: str
    """Layer under whose name the second moment of the shared input is stored."""
    weight: Tensor
    """Whole weight (m, n)."""
    moments: Moments
    """Whole statistics of the layer. The input second moment is included only for the first layer with that input."""


@exact_products()
def decompose(
    layers: LayerSet,
    statistics: StatisticsCollector,
    metric: Metric,
    *,
    progress: bool = False,
    weigh: bool = False,
    round_off: bool = False,
    steps: Mapping[str, Step] | None = None,
    spectra: MutableMapping[str, Spectrum] | None = None,
    highest: Mapping[str, int] | None = None,
    warn: bool = True,
    groups: Mapping[str, tuple[int, int]] | None = None,
) -> Decomposition:
    """Compute spectra and scores of all layers; layers that share an input share its whitening. Collective.

    All processes work through their shares at the same time, layer by layer. Each process holds the whole weight and
    statistics of one layer at a time, the latest whitening and, on the CPU, the spectra of its share.

    Args:
        layers: the layers and the processes that hold them.
        statistics: calibration statistics of the layers.
        metric: coordinates of the SVD.
        progress: draw a progress bar.
        weigh: also compute the importance of outputs and inputs.
        round_off: also compute the predicted cost of storing components in 8 bits.
        steps: step of each weight along its gradient before its SVD; see `Spectrum.of`. None for no step, as for the
            layers that are not in it.
        spectra: mapping that stores the spectra; None for a new dictionary.
        highest: number of components of each layer whose factors are stored; None for all. All have scores.
        warn: warn of singular second moments, if that matters; False if the caller does.
        groups: layer that reads a hidden width -> number of units that could go at a time, and that must remain. None
            for no such layer.

    Raises:
        CalibrationError: statistics are missing, not finite or degenerate, or an SVD failed. The message names the
            layer.
        ProcessFailedError: such an error occurred on another process.
    """
    spectra = {} if spectra is None else spectra
    components: dict[str, Components] = {}
    importances: dict[str, tuple[Tensor, Tensor]] = {}
    removed: dict[str, Removed] = {}
    whitener = Whitener(metric, None if weigh or round_off else statistics.roots)  # these use roots in float64
    shares = shares_of(layers, statistics, metric)
    for layer in brought_together(layers, statistics, shares, "spectra", progress=progress):
        with layers.team.together():
            if layer is not None:
                name, W = layer.name, layer.weight
                whitening = whitener.whitening(layer)
                G = layer.moments.mean_gradient(name)
                spectrum = spectrum_of(
                    layers[name], W, whitening, *(() if steps is None else (G, steps.get(name, NO_STEP)))
                )
                delta = spectrum.sensitivities(G)
                if weigh:
                    H = whitening.whiten_gradient(G)
                    weighed = importance(whitening.inputs.diagonal(H.shape[1]).to(H), H)
                    importances[name] = weighed.outputs.cpu(), weighed.inputs.cpu()
                rounding, rounding_dense = None, None
                if round_off:
                    rounding = rounding_by_component(spectrum, whitening).cpu()
                    rounding_dense = rounding_of_dense(W, whitening)
                if groups and name in groups:
                    removed[name] = removed_units(W, whitening_of_units(layer, whitening.outputs), G, *groups[name])
                spectra[name] = (spectrum if highest is None else spectrum.first(highest[name])).to("cpu")
                components[name] = Components(spectrum.sigma.cpu(), delta.cpu(), rounding, rounding_dense)
                del W, G, whitening, spectrum, delta  # before the next layer is brought together
        del layer
    scores = layers.of_all_processes(components)
    jitters = layers.of_all_processes(whitener.jitters)
    if warn and layers.team.rank == 0:
        warn_of_jitter(jitters)
    owners = {name: rank for rank, names in enumerate(shares) for name in names}
    weights = {name: Importance(*pair) for name, pair in layers.of_all_processes(importances).items()}
    gone = layers.of_all_processes(removed) if groups else {}
    return Decomposition(owners, spectra, {name: scores[name] for name in layers}, weights, jitters, gone)


def whitening_of_units(layer: LayerAtOwner, outputs: Root = IDENTITY) -> Whitening:
    """Return the roots by which hidden units in front of a layer are removed; see `shrunk_to_diagonal`.

    Args:
        layer: layer that reads a hidden width, with the second moment of its input.
        outputs: root of its output-gradient second moment, if it is needed.
    """
    A = layer.moments.second_moment(layer.name)
    tokens = layer.moments.tokens.get(layer.leader, 0)
    return Whitening(Root(*safe_cholesky(shrunk_to_diagonal(A, tokens), layer.name)), outputs)


def gradient_squares(
    layers: LayerSet, statistics: StatisticsCollector, metric: Metric, *, progress: bool = False
) -> dict[str, float]:
    """Return `<H, H>` of each layer, with the whitened gradient `H = R^-1 G L^-T`. Collective.

    Arguments and errors are those of `decompose`.
    """
    squares: dict[str, float] = {}
    whitener = Whitener(metric, statistics.roots)
    shares = shares_of(layers, statistics, metric)
    for layer in brought_together(layers, statistics, shares, "gradients", progress=progress):
        with layers.team.together():
            if layer is not None:
                whitening = whitener.whitening(layer)
                G = layer.moments.mean_gradient(layer.name).to(accumulated(layer.weight.dtype))
                squares[layer.name] = float(whitening.whiten_gradient(G).square().sum())
                del G, whitening
        del layer
    return layers.of_all_processes(squares)


class Whitener:
    """Builder of whitenings, layer by layer, that reuses the input side for layers that share an input.

    Args:
        metric: coordinates of the SVD.
        roots: roots that were kept of earlier rounds; None to compute all.

    Attributes:
        jitters: name -> jitter that the Cholesky factorization of the second moment needed, where it matters: above
            `HARMLESS_JITTER`, or for fewer tokens than the moment has rows.
    """

    def __init__(self, metric: Metric, roots: KeptRoots | None = None) -> None:
        self.jitters: dict[str, float] = {}
        self._metric = metric
        self._roots = roots if roots is not None and metric.of_second_moments else KeptRoots(active=False)
        self._inputs: tuple[str, Root] | None = None

    def whitening(self, layer: LayerAtOwner) -> Whitening:
        """Return the whitening of a layer. Errors are those of `Metric.input_root`."""
        if self._inputs is None or self._inputs[0] != layer.leader:
            self._inputs = None  # free it before the next one is built
            self._inputs = layer.leader, self._input_root(layer)
            few = layer.moments.tokens.get(layer.leader, 0) < layer.weight.shape[1]
            self._record(layer.leader, self._inputs[1].jitter, HARMLESS_JITTER * (not few))
        outputs = self._output_root(layer)
        self._record(f"the output of {layer.name}", outputs.jitter, HARMLESS_JITTER)
        return Whitening(self._inputs[1], outputs)

    def _record(self, name: str, jitter: float, harmless: float) -> None:
        if jitter > harmless:
            self.jitters[name] = jitter

    def _input_root(self, layer: LayerAtOwner) -> Root:
        moments, leader, dtype = layer.moments, layer.leader, accumulated(layer.weight.dtype)
        build = partial(self._metric.input_root, moments, layer.name, layer.weight.shape[1])
        sums, tokens = moments.input_sums.get(leader), moments.tokens.get(leader, 0)
        return self._roots.root(f"the input of {leader}", sums, tokens, dtype, build)

    def _output_root(self, layer: LayerAtOwner) -> Root:
        moments, name, dtype = layer.moments, layer.name, accumulated(layer.weight.dtype)
        build = partial(self._metric.output_root, moments, name, layer.weight.shape[0])
        sums, terms = moments.output_sums.get(name), moments.output_terms or moments.loss_terms
        return self._roots.root(f"the output of {name}", sums, terms, dtype, build)


def shares_of(layers: LayerSet, statistics: StatisticsCollector, metric: Metric) -> list[list[str]]:
    """Return the layers that each process decomposes, with about equal work for all. Collective."""
    statistics.complete()
    return share_out(layers, statistics.moments.leaders, layers.team.size, outputs=metric.needs_outputs)


def brought_together(
    layers: LayerSet, statistics: StatisticsCollector, shares: list[list[str]], title: str, *, progress: bool
) -> Iterator[LayerAtOwner | None]:
    """Yield the layers of this process, each whole, and None in turns where only other processes have one. Collective.

    Args:
        layers: the layers.
        statistics: complete statistics of the layers.
        shares: names of the layers of each process, from `shares_of`.
        title: name of the progress bar.
        progress: draw the progress bar.
    """
    started: set[str] = set()
    with step_shown(title, len(layers), "layer", shown=progress) as advance:
        for turn in zip_longest(*shares):
            own = None
            for rank, name in enumerate(turn):
                if name is not None:
                    leader = statistics.moments.leaders.get(name, name)
                    layer = statistics.layer_at(rank, name, inputs=leader not in started)
                    started.add(leader)
                    own = LayerAtOwner(name, leader, *layer) if layer is not None else own
                    del layer
            handed, own = [own], None  # hold no reference to a layer that the caller has released
            yield handed.pop()
            advance(sum(name is not None for name in turn))


def spectrum_of(
    target: Target, weight: Tensor, whitening: Whitening, G: Tensor | None = None, step: Step = NO_STEP
) -> Spectrum:
    """Return `Spectrum.of` for a weight of the layer `target`. Raises CalibrationError that names the layer."""
    try:
        return Spectrum.of(weight, whitening, G, step)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CalibrationError(
            f"the SVD of {target.name} {target.shape} failed: {error}; check the weight for NaN and infinite values, "
            "calibrate on more tokens, or add it to ignore"
        ) from error
