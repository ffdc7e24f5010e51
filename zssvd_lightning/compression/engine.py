"""Engine that runs the steps of a compression on one model, shared by the callback and the pipeline.

`take` runs a stage of the course. `truncate` and `correct` edit weights in place; `factorize` replaces modules once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zssvd_lightning._resources import Stopwatch
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.reach import Unreached
from zssvd_lightning.calibration.routing.removals import possible_removals
from zssvd_lightning.compression import reach
from zssvd_lightning.compression.corrections import STEPS, CorrectionStep, carry_out, step_name
from zssvd_lightning.compression.course import Act, Stage
from zssvd_lightning.compression.memory.mapped import targets_of
from zssvd_lightning.compression.memory.needs import stored_components
from zssvd_lightning.compression.quantization import put_in_8_bits
from zssvd_lightning.compression.report import Report
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.compression.widths.narrowing import groups_of, possible_narrowings, take_narrowed
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.decomposition.decompose import Decomposition, decompose
from zssvd_lightning.decomposition.factors import Factors, TruncatedWeights
from zssvd_lightning.decomposition.in_parts import DecompositionInParts
from zssvd_lightning.decomposition.narrowed import NarrowedWeights
from zssvd_lightning.decomposition.originals import Originals
from zssvd_lightning.decomposition.trace import Trace
from zssvd_lightning.distributed import LayerSet, Team
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.apart.routers import removable_experts
from zssvd_lightning.model.readiness import refuse_unready
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.model.replace import places_known, replace_module
from zssvd_lightning.offload.stores import OFFLOADS, Store
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Selection
from zssvd_lightning.selection.plan import Plan
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.whitening.rounding import Importance
from zssvd_lightning.whitening.spectrum import Spectrum, Step

logger = logging.getLogger(__name__)


class Compression:
    """Compression of one model.

    Args:
        model: any module with linear layers.
        config: settings of the compression.
        progress: draw progress bars for the long steps.
        team: processes that compress the model together; None for one process.
        replace: function that replaces a layer, `replace(model, old, new)`.
        stand_ins: dense layers that stand in for low-rank ones, in the model already; None if there are none.

    Attributes:
        gathering: collector of the statistics for the next step.
        store: maker of the mappings that hold statistics, weights, factors and spectra, where the settings ask.
        originals: weights (m, n) before the first truncation, or this process's part of them.
        safeguard: comparison of states on batches kept back; None to keep the last state.
        trace: record for the report.
        importances: importance of each truncated layer, for `quantize`; None unless the settings need it.
        shapes: shape (m, n) of every target layer, including those left dense.
        present: form of the layers that are low-rank already, by name.
        left_dense: name -> reason, for the layers that calibration has not reached. They are no longer targets.
        passed_over: layers that stay as they are in this stage, because its batches have not reached them.
        narrowed: weights of the layers that read a narrower hidden width.
        parts: decomposition that a sweep has made of the statistics of this stage; None if they are all at hand.
        may_truncate: False within a correction step that states not to truncate.
        choice_of_memory: sentence on the `memory` and `offload` that limits of memory have chosen; empty without.

    Raises:
        TargetError: there is no layer to compress, a selected layer cannot be compressed, or weights are not in memory.
        CalibrationError: the call is within `torch.inference_mode`.
        BudgetError: `min_rank_fraction` makes the prune ratio impossible, or it is reached already.
        PlanError: the plan cannot be read or belongs to another model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        progress: bool = True,
        team: Team | None = None,
        replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
        stand_ins: StandIns | None = None,
    ) -> None:
        refuse_unready(model)
        self.model, self.config, self.team = model, config, team or Team()
        self._replace = replace
        self.targets = LayerSet(targets_of(model, config), self.team)
        self.stand_ins = stand_ins
        self.metric = config.metric_used
        self.shapes = self.targets.shapes
        self.left_dense: dict[str, str] = {}
        self.passed_over: Mapping[str, Unreached] = {}
        self.present = {} if stand_ins is None else stand_ins.present
        self.coverage, self.budget = reach.covered(self)
        self.followed_plan = None if config.plan is None else Plan.read(config.plan, self.budget)
        self.store: Store = OFFLOADS[config.place]()
        self.gathering = StatisticsCollector(
            model,
            self.targets,
            output_side=config.watches_outputs,
            keep=config.corrections > 0 and not config.fresh_moments,
            sums=self.store.tensors,
        )
        self.gathering.finds_widths, self.gathering.free_widths.narrows = config.tries_widths, config.narrow
        self.gathering.roots.active &= config.place == "none"  # they lie in memory
        self.gathering.routed = removable_experts(model, self.targets) if config.remove_experts else ()
        self.originals = Originals(self.targets, self.store.tensors())
        self.stopwatch, self.trace, self.choice_of_memory = Stopwatch(), Trace(), ""
        self.progress = progress and self.team.rank == 0
        self.losses, self.fractions = list[float](), list[float]()
        self.last_step: tuple[float, float] | None = None
        self.first_steps: dict[str, Step] | None = None
        self.truncations, self.truncation_loss = 0, 0.0
        self.decomposition: Decomposition | None = None
        self.parts: DecompositionInParts | None = None
        self.selection: Selection | None = None
        self.truncated, self.may_truncate = self._no_factors(), True
        self.narrowed = NarrowedWeights(self.targets)
        self._installed: dict[str, nn.Module] = {}
        self.importances: dict[str, Importance] | None = None
        self.safeguard: Safeguard | None = None

    def take(self, stage: Stage) -> None:
        """Carry out the acts of a stage with the statistics since the last stage, then reset the statistics.

        Raises:
            CalibrationError: statistics are missing, zero or not finite; see `truncate` and `correct`.
            ConfigError: a registered correction does not do what it states; see `correct`.
        """
        self.passed_over = reach.review(self, stage)
        if self.safeguard is not None and stage.truncates and self.truncations == 0:
            self.safeguard.measure_dense(self)
        for act in reach.acts_of(self, stage):
            if act in (Act.DECOMPOSE, Act.TRUNCATE):
                getattr(self, act)()
            else:
                self.correct(STEPS[act] if isinstance(act, Act) else act)
        reached = stage.truncates and self.truncations >= self.config.truncations
        if self.safeguard is not None and reached and self.safeguard.judged != self.truncations:
            self.safeguard.consider(self)
        self.losses.append(self.gathering.moments.mean_loss)
        self.gathering.start_afresh()

    def leave_dense(self, reasons: Mapping[str, str]) -> None:
        """Take layers out of the targets for the rest of the compression. The prune ratio refers to the others.

        Raises:
            BudgetError: the prune ratio is impossible for the others.
        """
        self.left_dense |= {name: str(reason) for name, reason in reasons.items()}
        self.gathering.moments.leave_out(reasons)
        self.targets.leave_out(reasons)
        self.coverage, self.budget = reach.covered(self)

    @property
    def reached(self) -> LayerSet:
        """Target layers of which this stage has statistics."""
        return self.targets.without(self.passed_over)

    @torch.no_grad()
    def decompose(self) -> None:
        """Compute the spectra of all layers. The next batches measure the curvature along their components.

        Raises:
            CalibrationError: see `truncate`.
        """
        found, spectra = self._decomposed(), self.store.tuples(Spectrum)
        self.decomposition = found if self.config.by_blocks else found.everywhere(self.targets, spectra)
        self.gathering.spectra = self.decomposition.spectra

    @torch.no_grad()
    def truncate(self, steps: Mapping[str, Step] | None = None) -> None:
        """Decompose all layers, select ranks and truncate in place, with the statistics since the last stage.

        If there are several truncations, each removes an equal share.

        Args:
            steps: step of each weight along its natural gradient before truncation; None for no step.

        Raises:
            CalibrationError: the statistics are missing, not finite or degenerate. The message names the layer.
            ProcessFailedError: such an error occurred on another process.
        """
        if not self.may_truncate:
            raise ConfigError(f"{step_name(self)} states truncates=False, so it must not truncate")
        decomposition, selection = self._select(self.budget.after(self.truncations + 1, self.config.truncations), steps)
        with self.stopwatch("truncate"):
            take_narrowed(self, selection, decomposition)
            changed = {name for name in self.targets if selection.kept[name] is not None} | {*selection.of_narrowed}
            self.originals.keep(name for name in self.targets if name in changed)
            before, self.truncated = self.truncated, self._no_factors()
            for name, target in self.targets.items():
                components = selection.kept[name]
                if components is None:
                    self.narrowed.put_back(name, self.originals)
                    continue
                if name in self.passed_over:
                    self.truncated.held[name] = before.held[name]
                else:
                    self.truncated.take(decomposition, name, components)
                target.assign(self.truncated.truncated(name))
        self.selection, self.decomposition, self.gathering.spectra = selection, None, None
        reach.forget_removed(self)
        self.truncations += 1
        if steps is None and self.metric.measures_loss:
            found = decomposition.components
            self.truncation_loss += self.team.decide_on_first(lambda: selection.dropped_second_order(found))
        kind = "truncation" if steps is None and self.truncations <= self.config.truncations else "step"
        self.trace.truncated(decomposition.components, selection, kind=kind, exact=self.metric.measures_loss)
        self.gathering.calls_to_record = self.calls_to_record
        if self.config.weighs_rows:
            known = {**(self.importances or {}), **decomposition.importances}
            self.importances = {name: known[name] for name in self.truncated}
        if self.team.rank == 0:
            logger.info("truncated %d of %d layers", len(self.truncated), len(self.targets))

    @torch.no_grad()
    def correct(self, step: CorrectionStep) -> None:
        """Complete the statistics since the last stage and take a correction step with them.

        Raises:
            CalibrationError: a statistic that the step needs is missing, zero or not finite.
            NonFiniteError: the step left a weight that is NaN or infinite.
            ConfigError: the step truncated although `Correction.truncates` is False, or the other way round.
        """
        carry_out(self, step)

    @property
    def calls_to_record(self) -> int:
        """Number of batches per stage whose forward passes are recorded for a refit; 0 before the first truncation."""
        return self.config.correction_batches if self.config.refits and self.truncations else 0

    @property
    def rounds(self) -> int:
        """Number of completed rounds after the first truncation."""
        return max(0, self.truncations - 1)

    def plan(self) -> Plan:
        """Return the ranks that `truncate` would choose from the current statistics, without changing weights.

        Raises:
            CalibrationError: see `truncate`.
        """
        reach.review(self)
        return Plan.of(self._select(self.budget)[1], self.budget, self.shapes, self.present)

    def factorize(self, dress: Callable[[str, Factored], Factored] | None = None) -> None:
        """Replace every truncated layer by a low-rank layer of the chosen storage.

        Args:
            dress: called as `dress(name, layer)` with each new layer, while it is whole. What it returns is inserted. A
                layer that stays low-rank is copied for it.
        """
        self.gathering.forget()
        if self.safeguard is not None:
            self.safeguard.settle(self)
        with self.stopwatch("factorize"), places_known(self.model):
            for name, layer in self._new_layers(copies=dress is not None):
                self._installed[name] = dress(name, layer) if dress and isinstance(layer, Factored) else layer
                self._replace(self.model, self.targets[name].module, self._installed[name])
                if self.team.whole_everywhere:  # `restore` needs the original alone
                    self.targets[name].release()
            if self.stand_ins is not None:
                self.stand_ins.put_back(self._in_8_bits())  # what `quantize` converts must stay in the model
            mark(self.model)

    def quantize(self) -> None:
        """Convert layers to the 8-bit form of the storage, including dense layers for `hq`; call after `factorize`."""
        if not self.config.form.rounds:
            return
        with self.stopwatch("store"), places_known(self.model):
            layers: dict[str, Any] = {
                name: self._installed.get(name, self.targets[name].module) for name in self._in_8_bits()
            }
            self._installed |= put_in_8_bits(self.model, layers, self.config.storage, self.importances, self._replace)

    def restore(self) -> None:
        """Restore the layers of before and their original weights, and discard the compression so far."""
        for name, module in self._installed.items():
            self._replace(self.model, module, self.targets[name].module)
        self.originals.put_back()
        self.decomposition, self.parts, self.selection, self._installed = None, None, None, {}
        reach.forget_removed(self)
        if self.stand_ins is not None:
            self.stand_ins.put_back()
        mark(self.model)
        self.truncations, self.truncation_loss, self.first_steps, self.trace = 0, 0.0, None, Trace()
        self.truncated, self.narrowed = self._no_factors(), NarrowedWeights(self.targets)
        self.gathering.forget()

    def report(self) -> Report:
        """Return the report of the compression so far."""
        return Report.of(self)

    def _new_layers(self, *, copies: bool) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name and new layer of each truncated layer, and copies of layers that stay low-rank if asked."""
        yield from self.truncated.layers(self.gathering.free_widths)
        yield from self.narrowed.layers()
        if copies and self.stand_ins is not None:
            for name in [name for name in self.budget.present if name not in self.truncated]:
                yield name, self.stand_ins.copy_of(name)

    def _in_8_bits(self) -> list[str]:
        """Return the names of the layers that `quantize` converts."""
        layers = self.report().layers if self.config.form.rounds else {}
        return [name for name, layer in layers.items() if layer.in_8_bits]

    def _decomposed(self, steps: Mapping[str, Step] | None = None) -> Decomposition:
        if self.parts is not None:
            parts, self.parts = self.parts, None
            return parts.finished()
        with self.stopwatch("spectrum"):
            return decompose(
                self.reached,
                self.gathering,
                self.metric,
                progress=self.progress,
                highest=stored_components(self.config, self.budget) if self.config.by_blocks else None,
                weigh=self.config.weighs_rows,
                round_off=self.budget.chooses_bits,
                steps=steps,
                warn=self.truncations == 0,
                spectra=self.store.tuples(Spectrum),
                groups=groups_of(self),
            )

    def _no_factors(self) -> TruncatedWeights:
        return TruncatedWeights(self.targets, self.config.storage, self.store.tuples(Factors))

    def _select(self, budget: Budget, steps: Mapping[str, Step] | None = None) -> tuple[Decomposition, Selection]:
        found = self._decomposed(steps) if self.decomposition is None else reach.with_curvature(self)
        with self.stopwatch("select"):
            rule = self.config.rule if self.followed_plan is None else self.followed_plan.rule
            rest = reach.budget_of_rest(budget, self.selection, self.passed_over)
            experts = possible_removals(self.gathering, found.components, self.team)
            widths = possible_narrowings(self, found)
            selection = self.team.decide_on_first(lambda: rule(found.components, rest, experts, widths))
            return found, reach.with_fixed(selection, self.selection, self.passed_over)
