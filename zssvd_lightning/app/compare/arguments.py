"""What is compared: config files and `key=value` settings become the cells of a table."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from zssvd_lightning._validation import closest, require
from zssvd_lightning.app.run_config import CalibrationConfig, EvaluateConfig, ModelConfig, RunConfig
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.errors import ConfigError

OVERRIDE = re.compile(r"[\w.]+=")
"""How a setting begins; a path with `=` in it has a folder before that."""


OF_CELLS = {"compression.prune_ratio": "prune_ratios", "calibration.seed": "seeds"}
"""What the cells differ in, and the setting that says how."""


OWN = ("seed", "correction_samples")
"""What calibrations of one comparison may differ in: the draw, and what corrections see beside it."""


WITHOUT_EFFECT = ("training", "model.saved_dtype")
"""Settings, alone or in groups, of what a comparison does not do: it trains and saves nothing."""


@dataclass(frozen=True)
class CompareConfig:
    """What `zssvd compare` takes beside config files and what overrides them.

    Raises:
        ConfigError: a value is outside its range.
    """

    output: str = "???"
    """Folder that gets `compare.json`, `compare.md`, `compare.png` and a file for each cell."""
    prune_ratios: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6])
    """Fractions of the target layers' parameters to remove, each in (0, 1)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the draw of calibration windows."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks, as `zssvd evaluate` takes them."""
    data: str | None = None
    """Folder with rows of tasks, as `zssvd evaluate` takes it."""
    include: str | None = None
    """Folder with the harness's YAML files of more tasks."""
    limit: int | None = None
    """Rows of each task, from the first; all when None."""
    batch_size: int = 8
    """Sequences of a task in a batch."""
    share_calibration: bool = True
    """Gather the statistics of the first calibration once for all cells that calibrate alike."""
    keep: bool = False
    """Keep those statistics, in the output's `calibration/`, when all cells are done."""

    def __post_init__(self) -> None:
        for name, values in (("prune_ratios", self.prune_ratios), ("seeds", self.seeds)):
            require(
                0 < len(values) == len(set(values)), name, values, "a list of one value or more, none of them twice"
            )
        require(all(0.0 < p < 1.0 for p in self.prune_ratios), "prune_ratios", self.prune_ratios, "between 0 and 1")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class Settings:
    """All that the outcome of one process depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig | None = None
    """None for the dense model."""
    compression: CompressionConfig | None = None
    """None for the dense model."""
    evaluation: EvaluateConfig | None = None
    """None where statistics are gathered, and nothing else is done."""


class Cell(NamedTuple):
    """One compression of the table."""

    preset: str
    """Stem of the config file."""
    prune_ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.preset}-{self.prune_ratio}-{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What is to be measured."""

    config: CompareConfig
    dense: Settings
    cells: Mapping[Cell, Settings]
    """In the order of the table."""


def read_arguments(arguments: Sequence[str]) -> Comparison:
    """Reads what stands behind `zssvd compare`.

    Args:
        arguments: YAML files of `zssvd compress`, and `key=value` settings of `CompareConfig` and, for all files, of
            `RunConfig`.

    Raises:
        ConfigError: there are no files, two have the same stem, they are of different models, layers or texts, a key
            is unknown (the nearest valid one is named) or without effect, or a value is not possible here.
    """
    overrides = [entry for entry in arguments if OVERRIDE.match(entry)]
    presets = _presets([entry for entry in arguments if not OVERRIDE.match(entry)])
    own = [entry for entry in overrides if _key(entry) in _keys(CompareConfig)]
    others = [entry for entry in overrides if entry not in own]
    for entry in others:
        _refuse(_key(entry))
    config = load_config(CompareConfig, None, own)
    runs = {
        (preset, prune_ratio): _run(path, [*others, f"compression.prune_ratio={prune_ratio}"], config)
        for preset, path in presets.items()
        for prune_ratio in config.prune_ratios
    }
    _require_one_model({presets[preset]: run for (preset, _), run in runs.items()})
    dense, *_ = (_settings(run, config) for run in runs.values())
    cells = {
        Cell(*key, seed): replace(settings, calibration=replace(run.calibration, seed=seed))
        for key, run in runs.items()
        for settings in [_settings(run, config)]
        for seed in config.seeds
    }
    return Comparison(config, replace(dense, calibration=None, compression=None), cells)


def _presets(files: Sequence[str]) -> dict[str, str]:
    """Files by the names of their rows."""
    presets: dict[str, str] = {}
    for file in files:
        if not file.endswith(".yaml"):
            raise ConfigError(f"argument {file!r} is neither a .yaml file nor of the form key=value")
        other = presets.setdefault(name := Path(file).stem, file)
        if other is not file:
            raise ConfigError(f"{other} and {file} would both be the row {name!r}; rename one, or leave it out")
    if not presets:
        raise ConfigError("there is nothing to compare; name one YAML file or more, such as those in configs/")
    return presets


def _key(entry: str) -> str:
    return entry.partition("=")[0]


def _keys(schema: type) -> list[str]:
    """Dotted names of the settings in a dataclass."""
    return [
        name
        for own in fields(schema)
        for name in (
            [f"{own.name}.{key}" for key in _keys(own.type)]
            if isinstance(own.type, type) and is_dataclass(own.type)
            else [own.name]
        )
    ]


def _refuse(key: str) -> None:
    """Raises ConfigError when no file can have the key, or what it sets is not the same in all cells."""
    if key in OF_CELLS:
        raise ConfigError(f"{key} is what cells differ in; give all its values as {OF_CELLS[key]}=[...]")
    if any(key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT):
        raise ConfigError(f"{key} has no effect here, since a comparison trains and saves no model; leave it out")
    valid = _keys(RunConfig)
    if key.partition(".")[0] not in {name.partition(".")[0] for name in valid}:
        raise ConfigError(f"unknown key {key!r}{closest(key, [*_keys(CompareConfig), *valid])}")


def _run(path: str, overrides: Sequence[str], config: CompareConfig) -> RunConfig:
    try:
        run = load_config(RunConfig, path, overrides, {"output": config.output})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if run.recovery is not None:
        raise ConfigError(f"{path}: recovery is not part of a comparison; leave it out with recovery=null")
    if run.compression.plan is not None:
        raise ConfigError(f"{path}: compression.plan leaves no choice of a prune ratio; set it to null")
    if run.evaluation.text is None and run.evaluation.second is None and not config.tasks:
        raise ConfigError(f"{path}: nothing would be measured; give evaluation.text=SOURCE, or tasks as tasks=[piqa]")
    return run


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
    """What must be the same in all files."""
    return {
        "model.source": run.model.source,
        "model.dtype": run.model.dtype,
        **{f"calibration.{key}": value for key, value in asdict(run.calibration).items() if key not in OWN},
        "compression.include": run.compression.include,
        "compression.ignore": run.compression.ignore,
        **{f"evaluation.{key}": value for key, value in asdict(run.evaluation).items()},
    }


def _settings(run: RunConfig, config: CompareConfig) -> Settings:
    evaluation = EvaluateConfig(
        **asdict(run.evaluation),
        tasks=config.tasks,
        data=config.data,
        include=config.include,
        limit=config.limit,
        batch_size=config.batch_size,
    )
    return Settings(replace(run.model, saved_dtype=None), run.calibration, run.compression, evaluation)
