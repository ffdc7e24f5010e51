"""Settings of whole runs: model, texts, compression, evaluation and output, each with its meaning under it.

`zssvd keys` and the help of the command line are made of these docstrings.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from zssvd_lightning._numerics import DTYPES, multiplies_bfloat16
from zssvd_lightning._types import check_types
from zssvd_lightning._validation import require, require_count, require_one_of
from zssvd_lightning.compression.report_table import PERPLEXITIES
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import ConfigError, shown

EXPORTS = ("dense", "self_contained", "onnx")
"""Formats of `zssvd export`."""


PRECISIONS = ("auto", "32-true", "bf16-mixed")
"""Precisions of calibration without a Trainer."""


OF_TASKS_ALONE = ("limit", "data", "include")
"""Settings of an evaluation that have no effect without tasks."""


@dataclass(frozen=True)
class ModelConfig:
    """Model to compress."""

    source: str = "???"
    """Model source: `package:NAME` (a package that ships a GGUF file), a local folder, or a hub id. `model: SOURCE`
    alone means the same."""
    dtype: str = "float32"
    """Floating-point type of the weights while compressing."""
    saved_dtype: str | None = None
    """Floating-point type of the weights in the output; `dtype` when None."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_one_of("model.saved_dtype", self.saved_dtype or self.dtype, DTYPES)


@dataclass(frozen=True)
class CalibrationConfig:
    """Batches from which the statistics are gathered."""

    text: str = "???"
    """Text source: `package:NAME[:SPLIT]`, `python[:SPLIT]`, a local `.txt`, `.raw`, `.jsonl` or `.parquet` file, or
    `datasets:NAME[:CONFIG]:SPLIT`. `#FIELD` at the end names the field to read."""
    second: str | None = None
    """Second text source, from which every other window is then drawn."""
    samples: int = 64
    """Number of windows, drawn without replacement from the text, or half from each of two."""
    correction_samples: int = 0
    """Number of further windows, which gradient steps use first; with 0 they use those of the calibration again."""
    length: int = 512
    """Tokens in a window."""
    batch_size: int = 4
    """Windows in a batch."""
    seed: int = 0
    """Seed of the draw."""
    precision: str = "32-true"
    """Precision of the passes over the batches: `32-true` (that of the weights), `bf16-mixed`, which is faster on
    processors that multiply in bfloat16 and much slower on others, or `auto`, which takes the faster one."""

    def __post_init__(self) -> None:
        check_types(self, "calibration.")
        require_count("calibration.samples", self.samples, 1)
        require(
            self.samples >= 2 or self.second is None, "calibration.samples", self.samples, "2 or more for two texts"
        )
        require(self.second != self.text, "calibration.second", self.second, "another text than calibration.text")
        require_count("calibration.batch_size", self.batch_size, 1)
        require_count("calibration.correction_samples", self.correction_samples, 0)
        require(
            self.correction_samples == 0 or self.samples % self.batch_size == 0,
            "calibration.samples",
            self.samples,
            f"whole batches of {self.batch_size} where others follow for corrections",
        )
        require_count("calibration.length", self.length, 2)
        require_one_of("calibration.precision", self.precision, PRECISIONS)

    @property
    def batches(self) -> int:
        """Number of batches that `samples` fill; those of `correction_samples` come after them."""
        return -(-self.samples // self.batch_size)

    def precision_on(self, device: torch.device) -> str:
        """Return the precision on a device: `precision`, or what `auto` means there."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


@dataclass(frozen=True)
class TrainingConfig:
    """Text and length of the training after compression; see `RunConfig.recovery`."""

    text: str | None = None
    """Text source; `calibration.text` and `calibration.second` when None."""
    second: str | None = None
    """Second text source, from which every other window then comes; only with `training.text`."""
    held_out: int = 16
    """Number of windows that neither calibration nor training sees, half from each of two texts. Their loss chooses the
    final state. At most a tenth of a text is kept back. Sources with different names must not be of the same text."""
    steps: int = 100
    """Optimizer steps, unless `recovery.minutes` limits the training."""
    length: int = 256
    """Tokens in a window."""
    batch_size: int = 4
    """Windows in a batch."""
    precision: str = "32-true"
    """Precision of the whole fit, including calibration, as Lightning names it, such as `bf16-mixed`."""
    gradient_clip_val: float | None = 1.0
    """Largest norm of all gradients together; no limit when None."""
    dense_lr: float | None = None
    """Highest learning rate for the dense model fine-tuned for comparison; that of the recovery when None."""
    seed: int = 0
    """Seed of the draw of windows."""

    def __post_init__(self) -> None:
        check_types(self, "training.")
        require(
            self.second is None or (self.text is not None and self.text != self.second),
            "training.second",
            self.second,
            "another text than training.text, which must be given too",
        )
        require_count("training.held_out", self.held_out, 1)
        require_count("training.steps", self.steps, 1)
        require_count("training.length", self.length, 2)
        require_count("training.batch_size", self.batch_size, 1)
        clip = self.gradient_clip_val
        require(clip is None or clip > 0, "training.gradient_clip_val", clip, "above 0")
        require(self.dense_lr is None or self.dense_lr > 0, "training.dense_lr", self.dense_lr, "above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Texts on which perplexity is measured, and tasks. Without any, nothing is measured."""

    text: str | None = None
    """Text source, as in `calibration.text`; use one on which nothing was chosen."""
    second: str | None = None
    """Text source of another domain, reported beside the first."""
    third: str | None = None
    """Text source of a third domain, such as one that nothing was calibrated or trained on."""
    windows: int = 16
    """Number of windows from the start of the text; 0 for the whole text."""
    length: int = 1024
    """Tokens in a window; the first of each is not predicted."""
    word_perplexity: bool = False
    """True to measure word perplexity too, as lm-evaluation-harness defines it, on as many tokens of each text."""
    tasks: list[str] = field(default_factory=list)
    """Multiple-choice tasks: `.jsonl` files of rows like those of `data`, or tasks of EleutherAI's
    lm-evaluation-harness by name (`[piqa,arc_easy,winogrande]`), which reads their rows from the hub."""
    data: str | None = None
    """Folder with `piqa_val.jsonl`, `arc_easy_test.jsonl` or `winogrande_val.jsonl`, with rows `{goal, choices, gold}`,
    `{question, choices, gold}` and `{sentence, choices, gold}`. Tasks are then read from it, none from the hub."""
    include: str | None = None
    """Folder with the harness's YAML files of more tasks."""
    limit: int | None = None
    """Number of rows of each task, counted from the first; every row when None."""
    batch_size: int = 8
    """Number of sequences of a task in a batch."""

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
        require_count("evaluation.windows", self.windows, 0)
        require_count("evaluation.length", self.length, 2)
        require(self.limit is None or self.limit >= 1, "evaluation.limit", self.limit, "1 or more")
        require_count("evaluation.batch_size", self.batch_size, 1)

    @property
    def texts(self) -> dict[str, str]:
        """Text sources by the name of their perplexity."""
        return {name: text for name, key in PERPLEXITIES.items() if (text := getattr(self, key)) is not None}

    def refuse_unused(self) -> None:
        """Raise ConfigError if a setting says how tasks are measured, and there are no tasks."""
        given = [name for name in OF_TASKS_ALONE if getattr(self, name) is not None]
        if given and not self.tasks:
            raise ConfigError(
                f"evaluation.{given[0]} is {shown(getattr(self, given[0]))}, but is of tasks alone, and there are "
                f"none; give some, such as evaluation.tasks=[piqa], or set evaluation.{given[0]} to null"
            )


@dataclass(frozen=True)
class EvaluateConfig(EvaluationConfig):
    """Measurements of `zssvd evaluate`: perplexity if there is a text, accuracy if there are tasks."""

    dense: str | None = None
    """Source of a second model to measure tasks on; for the folder of a run the model that was compressed, unless this
    is null."""


@dataclass(frozen=True)
class ExportConfig:
    """Format of `zssvd export`."""

    format: str = "dense"
    """`dense` merges compressed layers, for tools that know no low rank; `self_contained` adds the code that
    `trust_remote_code=True` needs to load the folder without this package; `onnx` is a graph for onnxruntime."""
    dtype: str | None = None
    """Floating-point type of the weights; as they were saved when None."""
    max_shard_size: str = "5GB"
    """Maximum size of each weight file."""

    def __post_init__(self) -> None:
        check_types(self)
        require_one_of("format", self.format, EXPORTS)
        if self.dtype is not None:
            require_one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class RunConfig:
    """Settings of `zssvd compress`."""

    preset: str = "best"
    """Method by name (`best`, `zs-svd`, `svd-llm`, ...), whose settings apply where `compression` gives none.
    `best-trained` sets `recovery` too."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    recovery: dict[str, Any] | None = None
    """Training after compression: `method` (`lora`, `factors`, `singular_values`) and the fields of its class in
    `recovery/methods.py`, or the method alone. None for no training."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: str = "???"
    """Output folder for the compressed model, its tokenizer and `report.json`."""

    def __post_init__(self) -> None:
        check_types(self)
