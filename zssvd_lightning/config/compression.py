"""What is removed, and by which rule: every setting of a compression, with its meaning under it."""

from dataclasses import dataclass, fields
from typing import Self, Unpack

from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.config.presets import PRESETS, settings_of
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.layers.storage import ROWS_IN_16_BITS, STORAGES, UNITS
from zssvd_lightning.selection.rules import BY_CURVATURE, CHOOSE_BITS, RULES
from zssvd_lightning.whitening.metrics import METRICS
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS

CORRECTION_STEPS = ("projected", "natural", "refit")


@dataclass(frozen=True)
class CompressionConfig:
    """What is removed, and by which rule.

    Raises:
        ConfigError: a value is outside its range or not one of the names there are.
    """

    prune_ratio: float = 0.2
    """Fraction of the target layers' parameters to remove, in (0, 1): 0.4 keeps 60 %."""
    metric: str = "input"
    """Coordinates the SVD is taken in: `none` (plain SVD), `rows` (FWSVD), `diagonal` (ASVD), `input` (whitened by the
    input second moment: SVD-LLM, ZS-SVD) or `two_sided` (by that of the gradients at the output too)."""
    output_side: str = "empirical"
    """Which gradients at the output those are: `empirical` (of the batch's own labels), `sampled` (of labels drawn from
    the model's predictions) or `top_k` (of the divergence over its likeliest tokens, IO-SVD); the last two take another
    backward pass."""
    reestimate: bool = False
    """Before the first truncation, estimate the curvature along each component from `correction_batches` batches more,
    where metric `two_sided` takes it for 1 (EK-FAC); for rules that go by curvature."""
    selection: str = "zero_sum"
    """Rule that drops components: `zero_sum` (the paper), `abs_delta`, `abs_delta_unordered`, `most_negative`,
    `sigma`, `uniform` (the same fraction of every matrix, as SVD-LLM does), `effective_rank` (D-Rank), `curvature`
    (least sum of half the squared singular values, for metric `two_sided`), `curvature_first_order` or
    `zero_sum_curvature`."""
    truncations: int = 1
    """In how many truncations the prune ratio is reached, in equal parts, with fresh statistics or a correction between
    one and the next."""
    corrections: int = 1
    """How many times a gradient step and a new truncation follow the first one."""
    correction_step: str = "projected"
    """Which step: `projected` on the gradient, as long as what truncation took reaches along it (the paper), `natural`,
    both gradient and projection as the metric measures them, `step_radius` long, or `refit`, none along a gradient:
    each weight is fitted in closed form to the outputs of its dense layer, from the inputs it gets now, at the same
    rank."""
    step_radius: float = 0.03
    """How long the first `natural` step is, over all weights together and as the metric measures it: half of its square
    is a divergence between predictions, in nats a token. Each further one is shorter by the same, on a line that is
    zero after the last: so noise averages out."""
    fresh_moments: bool = True
    """Take all statistics anew for the truncation after a step, as the paper does; without, the second moments of the
    first calibration go on to be used, and rules that go by delta see the gradient from before a `projected` step."""
    correction_batches: int = 8
    """How many batches the gradient of one step is averaged over."""
    line_search: bool = True
    """Take only the part of each `projected` step at which the loss is estimated to be least, from as many batches
    again; without, all of it, as the paper does."""
    budget_in: str = "parameters"
    """What `prune_ratio` is a fraction of: the target layers' `parameters` (two in 8 bits count as one), `bytes` of
    weights saved in 16 bits, or `flops` of a token's forward pass."""
    storage: str = "factors"
    """How matrices are kept: `factors` in the model's type, `remap` in 8 bits but for what the larger factor has more,
    which makes a component cost `max(m, n)` instead of `m + n`, `hq` all in 8 bits, for prune ratios above 0.5, `mixed`
    each matrix in 16 or in 8 bits, as the selection chooses, or `pivoted`, the same function as `factors` in
    `k (m + n - k)` numbers."""
    rows_in_16_bits: str = "last"
    """Which rows of the factors `remap` leaves in 16 bits: the `last`, or by `loss_aware` choice over all layers."""
    min_rank_fraction: float = 0.0
    """No matrix gets a rank below this fraction of the highest rank that saves anything, in [0, 1]."""
    include: list[str] | None = None
    """Name patterns of the layers to compress (`*.q_proj`, or `re:` and a regular expression); all when None."""
    ignore: list[str] | None = None
    """Name patterns of layers to leave alone, in the same form."""
    plan: str | None = None
    """A YAML file with the rank of every layer, as a dry run writes it; `prune_ratio` and `selection` then do not
    choose."""

    def __post_init__(self) -> None:
        require(0.0 < self.prune_ratio < 1.0, "prune_ratio", self.prune_ratio, "strictly between 0 and 1")
        require(self.corrections >= 0, "corrections", self.corrections, "0 or more")
        require(self.truncations >= 1, "truncations", self.truncations, "1 or more")
        require(self.step_radius > 0.0, "step_radius", self.step_radius, "above 0")
        require(self.correction_batches >= 1, "correction_batches", self.correction_batches, "1 or more")
        require(0.0 <= self.min_rank_fraction <= 1.0, "min_rank_fraction", self.min_rank_fraction, "in [0, 1]")
        require_one_of("metric", self.metric, METRICS)
        require_one_of("output_side", self.output_side, OUTPUT_GRADIENTS)
        require_one_of("selection", self.selection, RULES)
        require_one_of("budget_in", self.budget_in, UNITS)
        require_one_of("correction_step", self.correction_step, CORRECTION_STEPS)
        require_one_of("storage", self.storage, STORAGES)
        require_one_of("rows_in_16_bits", self.rows_in_16_bits, ROWS_IN_16_BITS)
        if self.correction_step == "natural" and self.metric != "two_sided":
            raise ConfigError(
                f"correction_step 'natural' goes by metric 'two_sided', and the metric is {self.metric!r}"
            )
        if self.truncations > 1 and self.plan is not None:
            raise ConfigError(f"a plan is reached by one truncation, and truncations is {self.truncations}")
        if self.reestimate and (self.metric != "two_sided" or self.selection not in BY_CURVATURE):
            raise ConfigError(
                f"reestimate is of the curvature in metric 'two_sided', for selection "
                f"{' or '.join(map(repr, BY_CURVATURE))}, and they are {self.metric!r} and {self.selection!r}"
            )
        if self.truncations > 1 and self.corrections and self.refits:
            raise ConfigError("a refit keeps the ranks there are, so they can be reached by one truncation alone")
        if self.budget_in == "bytes" and self.rows_in_16_bits == "loss_aware":
            raise ConfigError(
                "rows_in_16_bits 'loss_aware' keeps an order of rows beside, which a budget in bytes does not count; "
                "keep the 'last' rows, or have budget_in 'parameters'"
            )
        if self.storage == "mixed" and self.selection not in CHOOSE_BITS and self.plan is None:
            raise ConfigError(
                f"storage 'mixed' leaves bits to be chosen by selection {' or '.join(map(repr, CHOOSE_BITS))}, and it "
                f"is {self.selection!r}"
            )
        if self.rows_in_16_bits == "loss_aware" and (self.storage, self.metric) != ("remap", "input"):
            raise ConfigError(
                f"rows_in_16_bits is 'loss_aware', which needs storage 'remap' and metric 'input', and they are "
                f"{self.storage!r} and {self.metric!r}"
            )

    @classmethod
    def of(cls, preset: str | None = None, **given: Unpack[Settings]) -> Self:
        """Return the settings of a preset, overridden by those given. A value of None counts as not given.

        Args:
            preset: name of a file in `presets/`; the defaults of this class when None.
            given: fields of this class; one pattern for `include` or `ignore` may be a plain string.

        Raises:
            ConfigError: there is no such preset, no such setting, or a value is out of range.
        """
        if preset is not None:
            require_one_of("preset", preset, PRESETS)
        names = [field.name for field in fields(cls)]
        for name in given:
            require_one_of("setting", name, names)
        settings = {} if preset is None else settings_of(preset)
        settings |= {name: value for name, value in given.items() if value is not None}
        if settings.get("plan") is not None:
            settings["plan"] = str(settings["plan"])
        for name in ("include", "ignore"):
            if isinstance(settings.get(name), str):
                settings[name] = [settings[name]]
        return cls(**settings)

    @classmethod
    def asked(cls, config: Self | None, preset: str | None, settings: Settings) -> Self:
        """Return `config`, or what `of` makes of a preset and settings.

        Raises:
            ConfigError: there are both.
        """
        if config is None:
            return cls.of(preset, **settings)
        if preset is not None or settings:
            given = ", ".join([*(["preset"] if preset is not None else []), *settings])
            raise ConfigError(f"config says it all already, so {given} cannot be given too; give one or the other")
        return config

    @property
    def watches_outputs(self) -> str | None:
        """The output side that calibration gathers, None where the metric has none."""
        return self.output_side if METRICS[self.metric].needs_outputs else None

    @property
    def asks_model(self) -> bool:
        """Whether the model itself, within what is compressed, has to be known: for its logits, or to be run again."""
        return self.watches_outputs not in (None, "empirical") or (self.refits and self.corrections > 0)

    @property
    def refits(self) -> bool:
        """Whether corrections are closed-form refits."""
        return self.correction_step == "refit"

    @property
    def weighs_rows(self) -> bool:
        """Whether calibration has to tell what errors in outputs and inputs cost."""
        return self.rows_in_16_bits == "loss_aware"
