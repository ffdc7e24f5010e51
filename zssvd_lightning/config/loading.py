"""Loading of YAML files and `key=value` overrides into dataclasses, with checks of keys and values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from zssvd_lightning._validation import closest, require_one_of
from zssvd_lightning.config.presets import PRESETS, explaining_default, settings_of
from zssvd_lightning.errors import ConfigError

T = TypeVar("T")


def load_config(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Load a YAML file and `key=value` overrides into the dataclass `schema`.

    Args:
        schema: a dataclass, such as those of `config` and `run_config`.
        path: YAML file; None to use only the defaults.
        defaults: values that override the defaults of the dataclass and have the lowest priority otherwise.
        overrides: dot-list entries such as `compression.prune_ratio=0.4`. Later entries override earlier ones.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the message names the closest valid key), a
            mandatory key has no value, or a value has the wrong type or is out of range.
    """
    layers = [] if path is None else [_file(Path(path))]
    try:
        layers = [OmegaConf.create(dict(defaults or {})), *layers]
        layers += [_override(entry) for entry in overrides]
        merged = OmegaConf.merge(_structured(schema, layers), *layers)
        if (preset := OmegaConf.select(merged, "preset")) is not None:
            require_one_of("preset", preset, PRESETS)
            layers.insert(0, OmegaConf.create({"compression": settings_of(preset)}))
            merged = OmegaConf.merge(_structured(schema, layers), *layers)
        with explaining_default(all(OmegaConf.select(layer, "preset") is None for layer in layers)):
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


def _structured(schema: type, layers: Sequence[DictConfig]) -> DictConfig:
    """Return the schema with its defaults, ready to be merged with `layers`."""
    config: DictConfig = OmegaConf.structured(schema)
    _make_writable(config, schema, layers)
    return config


def _make_writable(config: DictConfig, schema: type, layers: Sequence[DictConfig]) -> None:
    """Undo that OmegaConf 2.3 makes the nodes of frozen dataclasses read-only, including those that `layers` create."""
    OmegaConf.set_readonly(config, None)
    for name, hint in get_type_hints(schema).items():
        kind = next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)
        if kind is None or OmegaConf.is_missing(config, name):
            continue
        given = [part for layer in layers if isinstance(part := OmegaConf.select(layer, name), DictConfig)]
        if config[name] is None and given:
            config[name] = OmegaConf.structured(kind)
        if config[name] is not None:
            _make_writable(config[name], kind, given)


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
