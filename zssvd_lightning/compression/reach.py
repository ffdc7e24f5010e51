"""Treatment of layers that the batches of a compression have not reached.

Layers that the first batches have not reached stop being targets and stay dense. Layers that later batches have not
reached stay as the last truncation left them.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.reach import Unreached, named, unreached, without_curvature
from zssvd_lightning.compression.course import Act, Stage
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.decomposition.decompose import Decomposition
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import BudgetError, CalibrationError, LeftDenseWarning
from zssvd_lightning.model.apart.routers import forget_in
from zssvd_lightning.model.coverage import Coverage
from zssvd_lightning.model.recompression import left_whole
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Selection

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

logger = logging.getLogger(__name__)


def covered(compression: "Compression") -> tuple[Coverage, Budget]:
    """Return the share of the targets in the model, and the budget over them."""
    run = compression
    present = {name: form.kept.wide for name, form in run.present.items()}
    coverage = Coverage.of(run.model, run.targets, run.left_dense | left_whole(run.stand_ins), present)
    others = coverage.model_parameters - coverage.parameters
    return coverage, run.config.budget_over(run.targets.shapes, run.present, others)


def review(compression: "Compression", stage: Stage | None = None) -> Mapping[str, Unreached]:
    """Return the layers that stay as they are in a stage, and leave those dense that the first stage lacks. Collective.

    Args:
        compression: the compression, after the last batch of the stage.
        stage: the stage; None to plan the first truncation.

    Raises:
        CalibrationError: the batches have reached no layer.
        BudgetError: the prune ratio is impossible for the layers that are left.
    """
    if compression.decomposition is not None:
        return {}
    if compression.truncations == 0:
        _leave_unreached(compression)
    return _passed_over(compression, stage) if compression.truncations and stage is not None else {}


def _leave_unreached(compression: "Compression") -> None:
    """Leave layers dense that the first calibration has not reached, and warn once, on the first process."""
    run = compression
    run.gathering.complete()
    reasons = _unreached(run, inputs=True, outputs=True)
    if reasons:
        present = {name: form.kept.wide for name, form in run.present.items()}
        warn_of_unreached(reasons, run.targets, run.config, run.coverage.model_parameters, present)
        run.leave_dense(reasons)


def warn_of_unreached(
    reasons: Mapping[str, Unreached],
    layers: LayerSet,
    config: CompressionConfig,
    model_parameters: int,
    present: Mapping[str, int] | None = None,
) -> None:
    """Warn of layers that will stay dense, on the first process.

    Args:
        reasons: the layers that stay dense, with the reason.
        layers: all target layers.
        config: settings of the compression.
        model_parameters: parameters of the whole model.
        present: parameters of the layers that are low-rank already, by name.

    Raises:
        CalibrationError: these are all layers.
    """
    if len(reasons) == len(layers):
        raise CalibrationError(f"calibration has reached none of the {len(layers)} target layers. {named(reasons)}")
    of = {name: m * n for name, (m, n) in layers.shapes.items()} | dict(present or {})
    theirs, total = sum(of[name] for name in reasons), sum(of.values())
    if layers.team.rank == 0:
        counts = f"prune_ratio {config.prune_ratio} counts over"
        if config.plan is not None:
            counts = "the removed fraction counts over"
        elif config.budget_of == "model":
            counts = f"prune_ratio {config.prune_ratio} of the whole model comes from"
        warnings.warn(
            f"{len(reasons)} of {len(layers)} target layers stay dense, because calibration has not reached them: "
            f"{theirs / total:.1%} of the target parameters and {theirs / model_parameters:.1%} of the model; {counts} "
            f"the other {len(layers) - len(reasons)} layers alone. {named(reasons)}; or add them to ignore",
            LeftDenseWarning,
            stacklevel=2,
        )


def warn_of_unreached_in(statistics: StatisticsCollector, layers: LayerSet, config: CompressionConfig, of: int) -> None:
    """Complete the statistics, and warn of layers without; `of` is the number of parameters of the model. Collective.

    Raises:
        CalibrationError: all layers are without.
    """
    statistics.complete()
    outputs = config.watches_outputs is not None
    if reasons := unreached(layers, statistics.moments, outputs=outputs):
        warn_of_unreached(reasons, layers, config, of)


def acts_of(compression: "Compression", stage: Stage) -> Sequence[Act | Callable[[Any], None]]:
    """Return the acts of a stage: none if all layers are removed or have fewer hidden units, and nothing can change."""
    run = compression
    fixed = set() if run.selection is None else {*run.selection.removed, *run.selection.of_narrowed}
    if not fixed.issuperset(run.targets):
        return stage.acts
    run.truncations += stage.truncates
    return ()


def _passed_over(compression: "Compression", stage: Stage) -> dict[str, Unreached]:
    """Return the layers that stay as they are in a later stage, which has no statistics of them, and warn.

    Those of removed experts, and those with fewer outputs or inputs, are among them, without a warning.
    """
    run = compression
    if stage.acts == (Act.SHORTEN_STEP,):  # which needs nothing but the loss
        return {}
    run.gathering.complete()
    removed = [] if run.selection is None else [*run.selection.removed, *run.selection.of_narrowed]
    reasons = _unreached(run, inputs=stage.truncates, outputs=stage.truncates)
    reasons = {name: reason for name, reason in reasons.items() if name not in removed}
    if len(reasons) == len(run.targets):
        raise CalibrationError(
            f"the {stage.gathers} batches have reached none of the {len(run.targets)} layers. {named(reasons)}"
        )
    if reasons and run.team.rank == 0:
        logger.warning(
            "%d of %d layers stay as the last truncation left them, because the %s batches have not reached them; the "
            "other layers keep the prune ratio of all. %s; or raise correction_batches",
            len(reasons),
            len(run.targets),
            stage.gathers,
            named(reasons),
        )
    return reasons | dict.fromkeys(removed, Unreached.NEVER_RAN)


def _unreached(compression: "Compression", *, inputs: bool, outputs: bool) -> dict[str, Unreached]:
    """Return the layers without the statistics of this stage, where the metric needs them. Collective."""
    run, moments = compression, compression.gathering.moments
    if run.parts is not None:
        return run.parts.of_all(moments)
    return unreached(run.targets, moments, inputs=inputs, outputs=outputs and run.config.watches_outputs is not None)


def forget_removed(compression: "Compression") -> None:
    """Keep the routers from choosing the experts that the present selection removes, and from no others."""
    selection = compression.selection
    forget_in(compression.model, compression.gathering.routed, [] if selection is None else selection.removed)


def with_curvature(compression: "Compression") -> Decomposition:
    """Return the decomposition with the measured curvature along its components. Collective.

    Layers that the batches have not reached keep the estimate without it, with a warning.
    """
    run, found = compression, compression.decomposition
    if found is None:
        raise RuntimeError("the curvature is measured along the components of a decomposition")
    run.gathering.complete()
    reasons = without_curvature(run.targets, run.gathering.moments)
    if reasons and run.team.rank == 0:
        logger.warning(
            "%d of %d layers are ranked without measured curvature, by the estimate from the first batches alone. %s",
            len(reasons),
            len(run.targets),
            named(reasons),
        )
    components = {
        name: components
        if name in reasons
        else replace(components, curvature=run.gathering.component_curvature(name).cpu())
        for name, components in found.components.items()
    }
    return replace(found, components=components)


def budget_of_rest(budget: Budget, fixed: Selection | None, names: Mapping[str, Unreached]) -> Budget:
    """Return the budget of all layers but `names`, which keep their ranks in `fixed`. It may ask for nothing.

    Raises:
        CalibrationError: without these layers the prune ratio cannot be kept.
    """
    if fixed is None or not names:
        return budget
    narrower = fixed.narrower(budget.shapes)
    kept = sum(
        budget.kept_of(name, fixed.rank(name), eight_bit=name in fixed.eight_bit, narrower=narrower) for name in names
    )
    rest = {name: shape for name, shape in budget.shapes.items() if name not in names}
    total = sum(budget.reference(name) for name in rest)
    unchecked = replace(budget, shapes=rest, prune_ratio=0.0, planned=True)
    if unchecked.kept(dict.fromkeys(rest)) <= budget.allowed - kept:
        return unchecked
    try:
        return replace(budget, shapes=rest, prune_ratio=(total - (budget.allowed - kept)) / total)
    except BudgetError as error:
        raise CalibrationError(
            f"{len(names)} layers of earlier batches have not been reached since, and the other {len(rest)} cannot "
            f"keep the prune ratio without them: {error}. {named(names)}; or raise correction_batches"
        ) from error


def with_fixed(selection: Selection, fixed: Selection | None, names: Mapping[str, Unreached]) -> Selection:
    """Return a selection in which the layers `names` are as in `fixed`."""
    if fixed is None or not names:
        return selection
    return replace(
        selection,
        kept={name: (fixed if name in names else selection).kept[name] for name in fixed.kept},
        drifts={name: (fixed if name in names else selection).drifts[name] for name in fixed.drifts},
        eight_bit=selection.eight_bit | (fixed.eight_bit & names.keys()),
        narrowed=fixed.narrowed,
    )
