"""Loading of YAML files and `key=value` overrides into dataclasses, with checks of keys and values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, YAMLError

from zssvd_lightning._files import checked_path
from zssvd_lightning._types import of_type
from zssvd_lightning._validation import closest, require_one_of
from zssvd_lightning._yaml import UnfitYAMLError, check_yaml, line_of, read_yaml_text, scalars
from zssvd_lightning.config.presets import PRESETS, TRAINED, explaining_default, settings_of, trained_by
from zssvd_lightning.errors import ConfigError, shown

T = TypeVar("T")


REQUIRED = "???"
"""Value of a key that must be given."""


SHORT_FORMS = {"model": "source", "recovery": "method"}
"""Groups of settings that may be given as a text, and the setting in the group that the text then is."""


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
        overrides: dot-list entries such as `compression.prune_ratio=0.4`. Later entries override earlier ones. As in
            the file, `model=SOURCE` stands for `model.source=SOURCE`, and `recovery=METHOD` for
            `recovery.method=METHOD`.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the message names the closest valid key), a
            mandatory key has no value, or a value has the wrong type or is out of range.
    """
    file = of_type(Path | None, path, "path")
    layers = [dict(defaults or {}), *([] if file is None else [_file(file)]), *map(read_override, overrides)]
    layers = [in_full(layer) for layer in layers]
    merged = _resolved(_merged(_defaults(schema), *layers))
    refuse_unknown(schema, merged)
    if (preset := merged.get("preset")) is not None:
        require_one_of("preset", preset, (*PRESETS, *TRAINED))
        base, recovery = trained_by(preset) if preset in TRAINED else (preset, None)
        given = merged.get("recovery")
        if recovery is None or (isinstance(given, Mapping) and "method" in given):  # its fields are those of one method
            told = {"compression": settings_of(base)}
        else:
            told = {"compression": settings_of(base), "recovery": recovery}
        merged = _resolved(_merged(_defaults(schema), told, *layers))
    with explaining_default(all(layer.get("preset") is None for layer in layers)):
        return build(schema, merged)


def build(schema: type[T], tree: Mapping[str, Any], section: str = "") -> T:
    """Return an instance of a dataclass from a mapping of its fields, in which nested dataclasses are mappings too.

    Args:
        schema: the dataclass.
        tree: values by field; the others have their defaults.
        section: start of the dotted names of the fields, such as `recovery.`.

    Raises:
        ConfigError: a key is unknown, a mandatory key has no value, or a value has the wrong type or is out of range.
    """
    refuse_unknown(schema, tree, section)
    hints = get_type_hints(schema)
    given: dict[str, Any] = {}
    for field in fields(schema):  # type: ignore[arg-type]
        name, kind = f"{section}{field.name}", _nested(hints[field.name])
        value = tree.get(field.name, MISSING)
        if isinstance(value, str) and value == REQUIRED:
            raise ConfigError(f"{name} has no value; give it in the YAML or as {name}=...")
        if kind is not None and isinstance(value, Mapping):
            given[field.name] = build(kind, value, f"{name}.")
        elif kind is hints[field.name] and value is not MISSING and not isinstance(value, kind):
            raise ConfigError(
                f"{name} is {shown(value)}, but must be a mapping with keys such as {_examples(kind, name)}"
            )
        elif value is not MISSING:
            given[field.name] = of_type(hints[field.name], value, name)
    return schema(**given)


def refuse_unknown(
    schema: type, tree: Mapping[Any, Any], section: str = "", hints: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError for a key of a mapping, or of those in it, that is no field of the dataclass `schema`.

    Args:
        schema: the dataclass.
        tree: the mapping.
        section: start of the dotted names of the fields.
        hints: other names of fields, by which the message finds the field that is meant.
    """
    kinds = get_type_hints(schema)
    names = {field.name for field in fields(schema)}
    for key, value in tree.items():
        if key not in names:
            meant = (hints or {}).get(str(key))
            advice = f"; did you mean {section + meant!r}?" if meant in names else ""
            raise ConfigError(
                f"unknown key {f'{section}{key}'!r}{advice or closest(f'{section}{key}', dotted(schema, section))}"
            )
        kind = _nested(kinds[key])
        if kind is not None and isinstance(value, Mapping):
            refuse_unknown(kind, value, f"{section}{key}.")


def dotted(schema: type, section: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings in a dataclass and in those that it contains."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        name, kind = f"{section}{field.name}", _nested(hints[field.name])
        if kind is None:
            yield name
        else:
            yield from dotted(kind, f"{name}.")


def read_override(entry: str) -> dict[str, Any]:
    """Return the nested mapping that a `key=value` override stands for.

    Raises:
        ConfigError: the entry has another form, or its value is not YAML.
    """
    key, equals, value = of_type(str, entry, "override").partition("=")
    if not equals:
        raise ConfigError(f"override {entry!r} is not of the form key=value")
    if not all(key.split(".")):
        raise ConfigError(f"override {entry!r} names no setting before the =; write key=value")
    try:
        _check(value)
        return _container(OmegaConf.from_dotlist([entry]), resolve=False)
    except (UnfitYAMLError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"the value of override {key}={value[:80]} is not valid YAML: {_first_line(error)}"
        ) from error


def in_full(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which the groups of `SHORT_FORMS` are mappings, even if they were given as a text."""
    return {
        name: {SHORT_FORMS[name]: value} if name in SHORT_FORMS and isinstance(value, str) else value
        for name, value in tree.items()
    }


def _file(path: Path) -> dict[str, Any]:
    path = checked_path(path, ConfigError, "config file")
    try:
        if not path.is_file():
            raise ConfigError(f"config file {path} {'is no file' if path.exists() else 'does not exist'}")
        text = read_yaml_text(path)
        root = _check(text)
        if not isinstance(root, MappingNode | None):
            raise ConfigError(f"config file {path} must hold a mapping of settings")
        return {} if root is None else _container(OmegaConf.create(text), resolve=False)
    except UnfitYAMLError as error:
        raise ConfigError(f"config file {path} is not readable YAML, {error}") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"config file {path} is not readable YAML: {_first_line(error)}") from error


def _check(text: str) -> Any:
    """Return the root of YAML text. Raise UnfitYAMLError if it cannot be loaded, or has a malformed reference."""
    root = check_yaml(text)
    for node in scalars(root):
        if "${" in node.value:
            try:
                OmegaConf.create({"value": node.value})
            except OmegaConfBaseException as error:
                raise UnfitYAMLError(
                    f"the reference {node.value!r} is not of the form ${{key}}", line_of(node)
                ) from error
    return root


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with the values of all layers, of which later ones win, also inside nested mappings."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            nested = isinstance(value, Mapping)
            merged[key] = _merged(before if nested and isinstance(before, Mapping) else {}, value) if nested else value
    return merged


def _resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping in which every reference `${key}` is replaced by the value of the key."""
    try:
        return _container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "a setting")
        raise ConfigError(f"{key} cannot be used: {_first_line(error)}") from error


def _container(config: Any, *, resolve: bool) -> dict[str, Any]:
    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=resolve)  # type: ignore[assignment]
    return tree


def _defaults(schema: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as plain values, so that references can be made to them."""
    hints = get_type_hints(schema)
    tree: dict[str, Any] = {}
    for field in fields(schema):
        if hints[field.name] is (kind := _nested(hints[field.name])):
            tree[field.name] = _defaults(kind)
        elif field.default_factory is not MISSING:
            tree[field.name] = field.default_factory()
        elif field.default is not MISSING:
            tree[field.name] = field.default
    return tree


def _nested(hint: Any) -> Any:
    """Return the dataclass that an annotation allows, or None."""
    return next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)


def _examples(kind: type, name: str) -> str:
    return ", ".join(list(dotted(kind, f"{name}."))[:2])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
