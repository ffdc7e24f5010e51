"""Settings of a compression, each with its documentation below it. `zssvd keys` shows these texts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self, Unpack

from zssvd_lightning._types import check_types
from zssvd_lightning._validation import require, require_count, require_one_of
from zssvd_lightning.config.contradictions import (
    either,
    refuse_contradictions,
    refuse_not_for_kinds,
    refuse_not_narrow,
    refuse_removals,
    refuse_unable,
)
from zssvd_lightning.config.corrections import CORRECTIONS
from zssvd_lightning.config.derived import DerivedSettings
from zssvd_lightning.config.placement import bytes_of, refuse_places
from zssvd_lightning.config.presets import DEFAULT, PRESETS, TRAINED, explaining_default, settings_of, trained_by
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.errors import BudgetError, ConfigError, ContradictionError
from zssvd_lightning.layers.storage import ROWS_IN_16_BITS, UNITS, Present, Shape
from zssvd_lightning.selection.budget import REFERENCES, Budget
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS

BUDGET_OF = ("targets", "model")
"""Possible references of a prune ratio."""

MOST_ROUNDS = 1000
"""Largest number of truncations or corrections. Each round gathers statistics or decomposes every weight."""


@dataclass(frozen=True)
class CompressionConfig(DerivedSettings):
    """Settings of a compression.

    The defaults of this class are those of preset `zs-svd-line-search`, but with ranks in multiples of 8. `of("best")`
    has those of the default preset.

    Raises:
        ConfigError: a value has another type, is out of range or not a known name.
        ContradictionError: two settings contradict each other.

    Example:
        >>> CompressionConfig.of("best", prune_ratio=0.4).selection
        'curvature'
    """

    prune_ratio: float = 0.2
    """Fraction to remove of the target layers' parameters, in (0, 1): 0.4 keeps 60%. `budget_of` and `budget_in`
    make it a fraction of something else."""
    metric: str = "input"
    """Coordinates of the SVD: `none` (plain SVD), `rows` (FWSVD), `diagonal` (ASVD), `input` (whitened by the second
    moment of the inputs: SVD-LLM, ZS-SVD) or `two_sided` (also whitened by the second moment of the output
    gradients)."""
    output_side: str = "empirical"
    """Source of the output gradients, for metrics that use them: `empirical` (the labels of the batch), `sampled`
    (labels drawn from the model's predictions) or `top_k` (the divergence over the most likely tokens, IO-SVD).
    `sampled` and `top_k` take an additional backward pass per batch."""
    reestimate: bool = False
    """Estimate the curvature of the loss along each component before the first truncation, from `correction_batches`
    additional batches (EK-FAC). False assumes a curvature of 1. Requires metric `two_sided` and a selection rule that
    uses curvature."""
    selection: str = "zero_sum"
    """Rule that drops components: `zero_sum` (the paper), `abs_delta`, `abs_delta_unordered`, `most_negative`,
    `sigma`, `uniform` (the same fraction of every matrix, as in SVD-LLM), `effective_rank` (D-Rank), `curvature`
    (smallest sum of half the squared singular values, for metric `two_sided`), `curvature_first_order` or
    `zero_sum_curvature`."""
    truncations: int = 1
    """Number of truncations that reach the prune ratio, in equal parts. Between two truncations, statistics are
    gathered again or a correction takes place."""
    corrections: int = 1
    """Number of corrections after the first truncation. Each is a gradient step and a new truncation, or a refit."""
    correction_step: str = "projected"
    """Step of a correction. `projected` (the paper): along the gradient, up to the point nearest to the original
    weight. `natural`: the same in the coordinates of the metric, with the length `step_radius`. `refit`: no gradient
    step; each weight is fitted in closed form to the outputs of its dense layer, given its current inputs, at the same
    rank."""
    step_radius: float = 0.03
    """Length of the first `natural` step, over all weights together and in the coordinates of the metric. Half of its
    square estimates the divergence between the predictions before and after, in nats per token. The length decreases
    linearly and would reach zero one step after the last, so that noise averages out."""
    fresh_moments: bool = True
    """Gather all statistics again for the truncation after a step, as in the paper. False reuses the second moments of
    the first calibration. Rules based on delta then use the gradient from before the `projected` step or, with
    `line_search`, from the end of the full step."""
    correction_batches: int = 8
    """Number of batches over which the gradient of one step is averaged."""
    line_search: bool = True
    """Scale each `projected` step to the minimum of a parabola through the loss (uses another `correction_batches`
    batches). False takes the full step, as in the paper."""
    budget_in: str = "parameters"
    """Unit of `prune_ratio`: `parameters` (two in 8 bits count as one), `bytes` of weights saved in 16 bits, or `flops`
    of the forward pass per token."""
    budget_of: str = "targets"
    """Reference of `prune_ratio`: the `targets`, or the whole `model` with embeddings and all else that is
    left alone. It is then an error if the targets alone cannot give that much."""
    ratio_of: str = "dense"
    """What `prune_ratio` is counted from, for layers that are low-rank already: the `dense` layers, so that what an
    earlier compression removed counts too, or the `present` ones. Equal for a dense model."""
    storage: str = "factors"
    """Storage of compressed layers, for an (m, n) weight of rank k. `factors`: two factors in the model's type.
    `remap`: factors in 8 bits, except the rows by which the larger factor exceeds the smaller; a component then costs
    `max(m, n)` instead of `m + n`. `hq`: everything in 8 bits, for prune ratios above 0.5. `mixed`: each matrix in 16
    or 8 bits, chosen by the selection rule. `pivoted`: the same function as `factors` in `k (m + n - k)` numbers."""
    rows_in_16_bits: str = "last"
    """Rows of the factors that `remap` leaves in 16 bits: the `last` ones, or (`loss_aware`) those over all layers
    whose rounding is predicted to cost most."""
    min_rank_fraction: float = 0.0
    """Lowest rank of a matrix, as a fraction in [0, 1] of the highest rank that saves anything."""
    rank_multiple: int = 8
    """Number whose multiples are the ranks of low-rank matrices, because hardware computes fastest with them: 8, 16, 32
    or 64, and 1 for any rank, as in the papers. A matrix whose smaller side is less than 16 times this number has
    multiples of the largest power of two that leaves it 16 steps: 8 from 128 on, 4 from 64, 2 from 32, and otherwise 1.
    The ranks of a `plan` are followed as they are."""
    include: list[str] | None = None
    """Name patterns of the layers to compress, such as `*.q_proj`, or `re:` and a regular expression. None means all
    linear layers. A single pattern needs no list."""
    ignore: list[str] | None = None
    """Name patterns of layers to leave unchanged, in the same form as `include`."""
    convolutions: bool = False
    """Compress `nn.Conv1d` and `nn.Conv2d` too, each group of channels by itself. A convolution at rank k is one to k
    channels and one of size 1 back. `include` and `ignore` take its name."""
    recurrent: bool = False
    """Compress the matrices of `nn.LSTM`, `nn.GRU` and `nn.RNN` too. That makes a model smaller, but hardly
    faster: the matrices for the states are multiplied out to run."""
    remove_experts: bool = False
    """Also remove whole experts of mixtures of experts, where that costs less of the loss than lower ranks: all
    matrices of such an expert go, and the router sends its tokens to the next best. Needs stacked experts, metric
    `two_sided` and selection `curvature` or `curvature_first_order`."""
    narrow: bool = False
    """Also remove units of hidden widths, as feed-forward networks have, where that costs less of the loss than
    lower ranks: the layers that meet there stay dense, with fewer outputs or inputs. Needs metric `two_sided`,
    selection `curvature` or `curvature_first_order`, and storage `factors` or `pivoted`. Corrections leave these layers
    as they are."""
    plan: str | None = None
    """YAML file with the rank of every layer, as written by a dry run. It replaces `prune_ratio` and `selection`."""
    memory: str = "auto"
    """Statistics held in memory: those of the `whole` model, or of one of its `blocks` at a time. `blocks` gives the
    same result with little more memory than the model takes. It runs the blocks once more per batch, and keeps the rest
    in scratch files in the folder for temporary files (`TMPDIR`). Not within a Trainer, and not for a `refit`. `auto`
    is what `max_memory` and `max_host_memory` choose, and `whole` without them."""
    offload: str = "auto"
    """Place of the statistics, original weights, factors and spectra: beside the model (`none`; spectra are in host
    memory), in host memory (`cpu`, for models on a GPU), or in scratch files in the folder for temporary files (`disk`,
    `TMPDIR`), from where one layer at a time is read. The result is the same. Each calibration batch reads and writes
    all statistics once. `auto` is what `max_memory` and `max_host_memory` choose, and `none` without them."""
    max_memory: int | str | None = None
    """Most memory on the device of the model, such as `24GiB`, `500MB` or a number of bytes. The fastest `memory` and
    `offload` that need no more are chosen by their formula. If none is small enough, the compression is refused."""
    max_host_memory: int | str | None = None
    """Most memory of this process in the host, with Python and its libraries, in the form of `max_memory`. For a model
    on the CPU there is one memory, and the smaller limit holds."""

    def __post_init__(self) -> None:
        require_one_of("metric", self.metric, METRICS)
        require_one_of("output_side", self.output_side, OUTPUT_GRADIENTS)
        require_one_of("selection", self.selection, RULES)
        require_one_of("budget_in", self.budget_in, UNITS)
        require_one_of("budget_of", self.budget_of, BUDGET_OF)
        require_one_of("ratio_of", self.ratio_of, REFERENCES)
        require_one_of("correction_step", self.correction_step, CORRECTIONS)
        require_one_of("storage", self.storage, STORAGES)
        require_one_of("rows_in_16_bits", self.rows_in_16_bits, ROWS_IN_16_BITS)
        refuse_places(self.memory, self.offload, self.correction_step if self.corrections and self.refits else None)
        check_types(self)
        for name in self.limits:
            bytes_of(self.limits[name], name)
        require(0.0 < self.prune_ratio < 1.0, "prune_ratio", self.prune_ratio, "strictly between 0 and 1: 0.4 for 40%")
        require_count("corrections", self.corrections, 0, MOST_ROUNDS)
        require_count("truncations", self.truncations, 1, MOST_ROUNDS)
        require(self.step_radius > 0.0, "step_radius", self.step_radius, "above 0")
        require_count("correction_batches", self.correction_batches, 1)
        require(0.0 <= self.min_rank_fraction <= 1.0, "min_rank_fraction", self.min_rank_fraction, "in [0, 1]")
        require_count("rank_multiple", self.rank_multiple, 1)
        measures = either(METRICS.those(lambda metric: metric.measures_loss))
        refuse_unable(self, measures)
        refuse_contradictions(self)
        refuse_not_for_kinds(self)
        refuse_removals(self, measures, either(RULES.those(lambda rule: rule.removes)))
        refuse_not_narrow(self, measures, either(RULES.those(lambda rule: rule.narrows)))

    @classmethod
    def of(cls, preset: str | None = None, **given: Unpack[Settings]) -> Self:
        """Return the settings of a preset, overridden by the given ones. A value of None counts as not given.

        Args:
            preset: name of a file in `presets/`; None for the defaults of this class.
            given: fields of this class.

        Raises:
            ConfigError: the preset or a setting is unknown, or a value has another type or is out of range.
        """
        if preset in TRAINED:
            raise ConfigError(
                f"preset {preset!r} trains after the compression, which needs a training loop; use it in ZSSVDCallback "
                f"or `zssvd compress`, or take preset {trained_by(preset)[0]!r} for the compression alone"
            )
        if preset is not None:
            require_one_of("preset", preset, PRESETS)
        names = [field.name for field in fields(cls)]
        for name in given:
            require_one_of("setting", name, names)
        settings = {} if preset is None else settings_of(preset)
        settings |= {name: value for name, value in given.items() if value is not None}
        return cls(**settings)

    @classmethod
    def asked(cls, config: Self | None, preset: str | None, settings: Settings) -> Self:
        """Return `config` if it is given, otherwise the settings of a preset, overridden by the given ones.

        Args:
            config: settings that the user built; None if there are none.
            preset: name of a preset; None for `presets.DEFAULT`.
            settings: fields of this class.

        Raises:
            ConfigError: `config` and others are given, or the settings are invalid.
        """
        if config is None:
            with explaining_default(preset is None):
                return cls.of(DEFAULT if preset is None else preset, **settings)
        require(isinstance(config, cls), "config", config, f"a {cls.__name__} or None")
        if preset is not None or settings:
            given = ", ".join([*(["preset"] if preset is not None else []), *settings])
            raise ConfigError(f"config has all settings, so {given} cannot be given too; give one or the other")
        return config

    def refuse_plan(self) -> None:
        """Raise ContradictionError if a plan of these settings would have to say more than ranks."""
        if self.remove_experts:
            raise ContradictionError("a plan has ranks of at least 1, so leave remove_experts out to write one")
        if self.narrow:
            raise ContradictionError("a plan has ranks and no hidden widths, so leave narrow out to write one")

    def budget_over(self, shapes: Mapping[str, Shape], present: Mapping[str, Present], others: int) -> Budget:
        """Return the budget over the target layers.

        Args:
            shapes: shape (m, n) of every target.
            present: form of the layers that are low-rank already, by name.
            others: number of parameters of the model that are in no target.

        Raises:
            BudgetError: the targets cannot give what is asked for.
        """
        counted = Budget(
            shapes,
            self.prune_ratio,
            self.min_rank_fraction,
            self.storage,
            planned=True,
            present={name: form for name, form in present.items() if name in shapes},
            ratio_of=self.ratio_of,
            rank_multiple=1 if self.plan is not None else self.rank_multiple,
        )
        share = 1.0 if self.budget_of == "targets" else counted.total / (counted.total + others)
        ratio = self.prune_ratio / share
        try:
            return replace(counted, prune_ratio=ratio, unit=self.budget_in, planned=self.plan is not None)
        except BudgetError as error:
            if self.budget_of == "targets":
                raise
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} of the whole model is {ratio:.4g} of its {len(shapes)} target layers, "
                f"which are {share:.1%} of it: {error}"
            ) from error


def settings_of_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `CompressionConfig` that an earlier release may have saved, with those added since.

    They have their defaults, except for `rank_multiple`: ranks were not restricted.
    """
    return asdict(CompressionConfig()) | {"rank_multiple": 1} | dict(saved)
