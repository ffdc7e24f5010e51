"""Every setting, with its meaning under it. Frozen dataclasses that OmegaConf reads from YAML and from `key=value`."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from zssvd_lightning.errors import ConfigError
from zssvd_lightning.output_sides import OUTPUT_SIDES
from zssvd_lightning.presets import PRESETS, settings_of
from zssvd_lightning.selection import BY_CURVATURE, CHOOSE_BITS, RULES
from zssvd_lightning.storage import ROWS_IN_16_BITS, STORAGES, UNITS
from zssvd_lightning.whitening import METRICS

T = TypeVar("T")

MOST_NAMED = 30
"""Names a message lists at most."""
EXPORTS = ("dense", "self_contained", "onnx")
CORRECTION_STEPS = ("projected", "natural", "refit")
PRECISIONS = ("32-true", "bf16-mixed")
DTYPES = ("float32", "bfloat16", "float16", "float64")


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
        require_one_of("output_side", self.output_side, OUTPUT_SIDES)
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
    def of(cls, preset: str | None = None, **given: Any) -> Self:
        """The settings of a preset, but for those given. None stands for one that is not given.

        Raises:
            ConfigError: there is no such preset, or a value is out of range.
        """
        if preset is not None:
            require_one_of("preset", preset, PRESETS)
        settings = {} if preset is None else settings_of(preset)
        return cls(**settings | {name: value for name, value in given.items() if value is not None})

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


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    source: str = "???"
    """`package:NAME` (a package that ships a GGUF file), a local folder, or a hub id."""
    dtype: str = "float32"
    """Floating-point type of the weights while compressing."""
    saved_dtype: str | None = None
    """Floating-point type of the weights in the output; `dtype` when None."""

    def __post_init__(self) -> None:
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_one_of("model.saved_dtype", self.saved_dtype or self.dtype, DTYPES)


@dataclass(frozen=True)
class CalibrationConfig:
    """Which batches the statistics are taken on."""

    text: str = "???"
    """A text source: `package:NAME[:SPLIT]`, a local `.txt/.raw/.jsonl/.parquet`, or `datasets:NAME[:CONFIG]:SPLIT`;
    `#FIELD` behind it names the field to read."""
    second: str | None = None
    """Another text source, of which every other window is then drawn."""
    samples: int = 64
    """Number of windows drawn from the text, or half from each, without replacement."""
    correction_samples: int = 0
    """Number of windows drawn beside those, which gradient steps go by first; with 0 they go by the same again."""
    length: int = 512
    """Tokens in a window."""
    batch_size: int = 4
    """Windows in a batch."""
    seed: int = 0
    """Seed of the draw."""
    precision: str = "32-true"
    """Of the passes over the batches without a Trainer: `32-true` (that of the weights) or `bf16-mixed`, which is
    faster on processors that multiply in bfloat16."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, "calibration.samples", self.samples, "1 or more")
        require(
            self.samples >= 2 or self.second is None, "calibration.samples", self.samples, "2 or more for two texts"
        )
        require(self.second != self.text, "calibration.second", self.second, "another text than calibration.text")
        require(self.batch_size >= 1, "calibration.batch_size", self.batch_size, "1 or more")
        require(self.correction_samples >= 0, "calibration.correction_samples", self.correction_samples, "0 or more")
        require(
            self.correction_samples == 0 or self.samples % self.batch_size == 0,
            "calibration.samples",
            self.samples,
            f"whole batches of {self.batch_size} where others follow for corrections",
        )
        require(self.length >= 2, "calibration.length", self.length, "2 or more")
        require_one_of("calibration.precision", self.precision, PRECISIONS)

    @property
    def batches(self) -> int:
        """How many batches `samples` are, which come before those of `correction_samples`."""
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class TrainingConfig:
    """What the factors are trained on after compression, and for how long; see `RunConfig.recovery`."""

    text: str | None = None
    """A text source; `calibration.text` when None."""
    steps: int = 100
    """Optimizer steps."""
    length: int = 256
    """Tokens in a window."""
    batch_size: int = 4
    """Windows in a batch."""
    precision: str = "32-true"
    """Of the whole fit, calibration included, as Lightning names it, such as `bf16-mixed`."""
    gradient_clip_val: float | None = 1.0
    """Largest norm of all gradients together; no limit when None."""
    dense_lr: float | None = None
    """Highest learning rate of the dense model that is fine-tuned for comparison; that of the recovery when None."""
    seed: int = 0
    """Of the draw of windows."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "training.steps", self.steps, "1 or more")
        require(self.length >= 2, "training.length", self.length, "2 or more")
        require(self.batch_size >= 1, "training.batch_size", self.batch_size, "1 or more")
        clip = self.gradient_clip_val
        require(clip is None or clip > 0, "training.gradient_clip_val", clip, "above 0")
        require(self.dense_lr is None or self.dense_lr > 0, "training.dense_lr", self.dense_lr, "above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """What perplexity is measured on. No text, no evaluation."""

    text: str | None = None
    """A text source, as in `calibration.text`; never one that anything was chosen on."""
    second: str | None = None
    """A text of another domain, reported beside the first."""
    windows: int = 16
    """How many windows from the start of the text; 0 means the whole text."""
    length: int = 1024
    """Tokens in a window; the first of each is not predicted."""

    def __post_init__(self) -> None:
        require(self.windows >= 0, "evaluation.windows", self.windows, "0 or more")
        require(self.length >= 2, "evaluation.length", self.length, "2 or more")


@dataclass(frozen=True)
class EvaluateConfig(EvaluationConfig):
    """What `zssvd evaluate` measures: perplexity where there is a text, accuracy where there are tasks."""

    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks of EleutherAI's lm-evaluation-harness (`[piqa,arc_easy,winogrande]`), which reads their rows from
    the hub."""
    data: str | None = None
    """Folder with `piqa_val.jsonl`, `arc_easy_test.jsonl` or `winogrande_val.jsonl`, rows `{goal, choices, gold}`,
    `{question, choices, gold}` and `{sentence, choices, gold}`. Those tasks are read from it, and none from the hub."""
    include: str | None = None
    """Folder with the harness's YAML files of more tasks."""
    dense: str | None = None
    """Model source to measure tasks on beside the one that is evaluated; for a folder of a run the model that was
    compressed, unless this is null."""
    limit: int | None = None
    """Rows of each task, from the first; all when None."""
    batch_size: int = 8
    """Sequences of a task in a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class ExportConfig:
    """What `zssvd export` writes."""

    format: str = "dense"
    """`dense` merges compressed layers, for tools that know no low rank; `self_contained` adds the code that
    `trust_remote_code=True` needs to load the folder without this package; `onnx` is a graph for onnxruntime."""
    dtype: str | None = None
    """Floating-point type of the weights; as they were saved when None."""
    max_shard_size: str = "5GB"
    """Size of each file of weights, at most."""

    def __post_init__(self) -> None:
        require_one_of("format", self.format, EXPORTS)
        if self.dtype is not None:
            require_one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class RunConfig:
    """A whole `zssvd compress` run."""

    preset: str | None = None
    """A method of the field by name (`best`, `zs-svd`, `svd-llm`, ...; see `presets/`), whose settings stand in for
    those that `compression` leaves out. `load_config` puts them there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    recovery: dict[str, Any] | None = None
    """How the factors are trained after compression: `method` (`lora`, `factors`, `singular_values`) and the fields of
    its class in `recovery.py`; only recipes that train take it."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: str = "???"
    """Folder that gets the compressed model, its tokenizer and `report.json`."""


def load_config(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Reads a YAML file and `key=value` overrides into the dataclass `schema`.

    Args:
        schema: one of the dataclasses of this file.
        path: YAML file, or None for the defaults alone.
        defaults: values that win over those of the dataclass, and over nothing else.
        overrides: dot-list entries such as `compression.prune_ratio=0.4`; later ones win.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest valid one is named), a mandatory
            key has no value, or a value is of the wrong type or out of range.
    """
    layers = [] if path is None else [_file(Path(path))]
    try:
        layers = [OmegaConf.create(dict(defaults or {})), *layers]
        layers += [_override(entry) for entry in overrides]
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        if (preset := OmegaConf.select(merged, "preset")) is not None:
            require_one_of("preset", preset, PRESETS)
            merged = OmegaConf.merge(OmegaConf.structured(schema), {"compression": settings_of(preset)}, *layers)
        loaded = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key), schema)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give it in the YAML or as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {error.msg}") from error
    if not isinstance(loaded, schema):
        raise TypeError(f"{schema} gave {type(loaded)}")
    return loaded


def closest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean ...?"` for the nearest valid dotted name, or a list of what there is."""
    valid = list(valid)
    by_end = {option.rsplit(".", 1)[-1]: option for option in reversed(valid)}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
    near = near or [by_end[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_end, n=1, cutoff=0.5)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(valid[:MOST_NAMED])}" + (", ..." if len(valid) > MOST_NAMED else "")


def _file(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except (OSError, YAMLError) as error:
        raise ConfigError(f"config file {path} is not readable YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config file {path} must hold a mapping of settings")
    return loaded


def _override(entry: str) -> DictConfig:
    if "=" not in entry:
        raise ConfigError(f"override {entry!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([entry])
    except YAMLError as error:
        raise ConfigError(f"the value of override {entry!r} is not valid YAML: {error}") from error


def _unknown_key(key: str, schema: type) -> str:
    return f"unknown key {key!r}" + closest(key, _leaves(OmegaConf.to_container(OmegaConf.structured(schema))))


def _leaves(tree: Any, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def require(holds: bool, name: str, value: object, range_: str) -> None:
    """Raises ConfigError, naming the setting and its range, unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {range_}")


def require_one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises ConfigError, naming the nearest valid value, unless `value` is one of them."""
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}{closest(value, valid)}")
