"""Arguments of a comparison: config files and `key=value` settings become the cells of a table."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from zssvd_lightning._types import check_types
from zssvd_lightning._validation import closest, require, require_count
from zssvd_lightning.app.run_config import CalibrationConfig, EvaluateConfig, ModelConfig, RunConfig
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.derived import OPT_INS
from zssvd_lightning.config.loading import dotted, load_config
from zssvd_lightning.config.presets import PRESETS, settings_of
from zssvd_lightning.errors import ConfigError

OVERRIDE = re.compile(r"[\w.]+=")
"""Start of a `key=value` setting; in a path with `=`, a folder comes first, so that it does not match."""


OF_CELLS = {"compression.prune_ratio": "prune_ratios", "calibration.seed": "seeds"}
"""Settings in which cells differ, and the setting of `CompareConfig` that lists their values."""


OWN = ("seed", "correction_samples")
"""Calibration settings that may differ within a comparison: the seed and the number of windows for corrections."""


OF_TASKS = ("tasks", "data", "include", "limit", "batch_size")
"""Settings of a comparison that win over those of the same name in `evaluation` of its files."""


WITHOUT_EFFECT = ("training", "model.saved_dtype")
"""Settings or groups of settings without effect, because a comparison trains and saves no model."""


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `zssvd compare`, besides config files and their overrides.

    Raises:
        ConfigError: a value is outside its range.
    """

    output: str = "???"
    """Output folder for `compare.json`, `compare.md`, `compare.png` and a file for each cell."""
    presets: list[str] = field(default_factory=list)
    """Presets to run on the one YAML file that is given, each a row; when empty, each YAML file is a row. A row that
    needs settings of its own is a file beside that one: `best` is `best.yaml` if there is one, else the preset."""
    prune_ratios: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6])
    """Fractions of the target layers' parameters to remove, each in (0, 1)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds for drawing calibration windows."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks, as for `zssvd evaluate`. Where this setting, or one of the next four, has its default, that of
    `evaluation` in the files holds."""
    data: str | None = None
    """Folder with rows of tasks, as for `zssvd evaluate`."""
    include: str | None = None
    """Folder with YAML files of more tasks for the harness."""
    limit: int | None = None
    """Number of rows of each task, counted from the first; every row when None."""
    batch_size: int = 8
    """Number of sequences of a task in a batch."""
    share_calibration: bool = True
    """True to gather the statistics of the first calibration once for all cells with the same calibration."""
    keep: bool = False
    """True to keep these statistics, in `calibration/` of the output folder, when all cells are done."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, values in (("prune_ratios", self.prune_ratios), ("seeds", self.seeds)):
            require(
                0 < len(values) == len(set(values)), name, values, "a list of one value or more, none of them twice"
            )
        require(len(self.presets) == len(set(self.presets)), "presets", self.presets, "a list with no name twice")
        require(all(0.0 < p < 1.0 for p in self.prune_ratios), "prune_ratios", self.prune_ratios, "between 0 and 1")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        require_count("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Settings:
    """Settings on which the result of one process depends."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig | None = None
    """Calibration settings; None for the dense model."""
    compression: CompressionConfig | None = None
    """Compression settings; None for the dense model."""
    evaluation: EvaluateConfig | None = None
    """Evaluation settings; None for a process that only gathers statistics."""


class Cell(NamedTuple):
    """Cell of the table: one compression."""

    preset: str
    """Name of the row: the preset, or the stem of its config file."""
    prune_ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Stem of the names of the cell's files."""
        return f"{self.preset}-{self.prune_ratio}-{self.seed}"


class Source(NamedTuple):
    """Source of the settings of a row."""

    path: str
    preset: str | None = None
    """Preset to apply to the file; None for that in the file."""


@dataclass(frozen=True)
class Comparison:
    """Settings of all measurements of a comparison."""

    config: CompareConfig
    dense: Settings
    cells: Mapping[Cell, Settings]
    """Settings of each cell, in the order of the table."""


def read_arguments(arguments: Sequence[str]) -> Comparison:
    """Parse the arguments of `zssvd compare`.

    Args:
        arguments: YAML files of `zssvd compress`, and `key=value` settings. Settings are keys of `CompareConfig` or,
            applied to all files, of `RunConfig`.

    Raises:
        ConfigError: there are no files, or several with `presets`, two rows have the same name, files differ in model,
            layers or texts, a preset or key is unknown (the message suggests the nearest one), a key has no effect, the
            file overrides a preset, or a value is invalid here.
    """
    overrides = [entry for entry in arguments if OVERRIDE.match(entry)]
    files = [entry for entry in arguments if not OVERRIDE.match(entry)]
    _require_files(files)
    own_keys = {*dotted(CompareConfig)}
    own = [entry for entry in overrides if _key(entry) in own_keys]
    others = [entry for entry in overrides if entry not in own]
    for entry in others:
        _refuse(_key(entry))
    config = load_config(CompareConfig, None, own)
    if config.presets and any(_key(entry) == "preset" for entry in others):
        raise ConfigError("preset is what rows differ in; give all its values as presets=[...]")
    rows = _rows(files, config.presets)
    runs = {
        (name, prune_ratio): _run(source, [*others, f"compression.prune_ratio={prune_ratio}"], config)
        for name, source in rows.items()
        for prune_ratio in config.prune_ratios
    }
    _require_one_model({rows[name].path: run for (name, _), run in runs.items()})
    dense, *_ = (_settings(run, config) for run in runs.values())
    cells = {
        Cell(*key, seed): replace(settings, calibration=replace(run.calibration, seed=seed))
        for key, run in runs.items()
        for settings in [_settings(run, config)]
        for seed in config.seeds
    }
    return Comparison(config, replace(dense, calibration=None, compression=None), cells)


def _require_files(files: Sequence[str]) -> None:
    for file in files:
        if not file.endswith(".yaml"):
            raise ConfigError(f"argument {file!r} is neither a .yaml file nor of the form key=value")
    if not files:
        raise ConfigError("there is nothing to compare; name one YAML file or more; zssvd init writes one")


def _rows(files: Sequence[str], presets: Sequence[str]) -> dict[str, Source]:
    """Return the sources of the rows by name."""
    if presets and len(files) > 1:
        raise ConfigError(
            f"presets run on one YAML file, but there are {len(files)}: {', '.join(files)}; name one, or leave presets "
            "out to have each file as a row"
        )
    sources = [_source(files[0], preset) for preset in presets] if presets else [Source(file) for file in files]
    rows: dict[str, Source] = {}
    for source in sources:
        other = rows.setdefault(name := source.preset or Path(source.path).stem, source)
        if other is not source:
            raise ConfigError(
                f"{other.path} and {source.path} would both be the row {name!r}; rename one, or leave it out"
            )
    return rows


def _source(file: str, preset: str) -> Source:
    """Return the file of that name beside the given one, or else the given file with the preset."""
    beside = Path(file).parent / f"{preset}.yaml"
    if beside.is_file():
        return Source(str(beside))
    if preset not in PRESETS:
        raise ConfigError(f"there is neither a preset {preset!r} nor a file {beside}{closest(preset, PRESETS)}")
    return Source(file, preset)


def _key(entry: str) -> str:
    return entry.partition("=")[0]


def _refuse(key: str) -> None:
    """Raise ConfigError for a key that is unknown, has no effect, or differs between cells."""
    if key in OF_CELLS:
        raise ConfigError(f"{key} is what cells differ in; give all its values as {OF_CELLS[key]}=[...]")
    if any(key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT):
        raise ConfigError(f"{key} has no effect here, since a comparison trains and saves no model; leave it out")
    valid = [*dotted(RunConfig)]
    if key.partition(".")[0] not in {name.partition(".")[0] for name in valid}:
        raise ConfigError(f"unknown key {key!r}{closest(key, [*dotted(CompareConfig), *valid])}")


def _run(source: Source, overrides: Sequence[str], config: CompareConfig) -> RunConfig:
    path, preset = source
    chosen = [] if preset is None else [f"preset={preset}"]
    try:
        run = load_config(RunConfig, path, [*chosen, *overrides], {"output": config.output})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if preset is not None:
        _require_preset(run.compression, source, preset, {_key(entry) for entry in overrides})
    if run.recovery is not None:
        raise ConfigError(f"{path}: recovery is not part of a comparison; leave it out with recovery=null")
    if run.compression.plan is not None:
        raise ConfigError(f"{path}: compression.plan leaves no choice of a prune ratio; set it to null")
    if run.compression.by_blocks:
        raise ConfigError(f"{path}: cells share statistics in memory; set compression.memory to 'whole'")
    if run.compression.place != "none":
        raise ConfigError(f"{path}: cells share statistics in memory; set compression.offload to 'none'")
    if run.compression.limits:
        raise ConfigError(f"{path}: cells share statistics in memory; leave {' and '.join(run.compression.limits)} out")
    evaluation = _evaluation(run, config)
    if not evaluation.texts and not evaluation.tasks:
        raise ConfigError(f"{path}: nothing would be measured; give evaluation.text=SOURCE, or tasks as tasks=[piqa]")
    evaluation.refuse_unused()
    return run


def _require_preset(compression: CompressionConfig, source: Source, preset: str, overridden: Collection[str]) -> None:
    """Raise ConfigError if the file, rather than an argument, overrides a setting of the preset."""
    for name, value in settings_of(preset).items():
        key, found = f"compression.{name}", getattr(compression, name)
        if found != value and not {"compression", key} & {*overridden}:
            raise ConfigError(
                f"{source.path}: {key} is {found!r}, but the preset {preset!r} has {value!r}; remove it from the file"
            )


def _require_one_model(runs: Mapping[str, RunConfig]) -> None:
    (first, told), *others = ((path, _same(run)) for path, run in runs.items())
    for path, found in others:
        for key, value in told.items():
            if found[key] != value:
                raise ConfigError(
                    f"{key} is {value!r} in {first} and {found[key]!r} in {path}, but a comparison is of one model, "
                    f"the same layers and the same texts; give one for all as {key}=..."
                )


def _same(run: RunConfig) -> dict[str, Any]:
    """Return the settings that must be the same in all files."""
    return {
        "model.source": run.model.source,
        "model.dtype": run.model.dtype,
        **{f"calibration.{key}": value for key, value in asdict(run.calibration).items() if key not in OWN},
        "compression.include": run.compression.include,
        "compression.ignore": run.compression.ignore,
        **{f"compression.{name}": getattr(run.compression, name) for name in OPT_INS},
        **{f"evaluation.{key}": value for key, value in asdict(run.evaluation).items()},
    }


def _evaluation(run: RunConfig, config: CompareConfig) -> EvaluateConfig:
    """Return the evaluation of a file, with what the comparison says of tasks."""
    default = EvaluateConfig()
    given = {name: value for name in OF_TASKS if (value := getattr(config, name)) != getattr(default, name)}
    return EvaluateConfig(**asdict(run.evaluation) | given)


def _settings(run: RunConfig, config: CompareConfig) -> Settings:
    model = replace(run.model, saved_dtype=None)
    return Settings(model, run.calibration, run.compression, _evaluation(run, config))
