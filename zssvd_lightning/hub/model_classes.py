"""Classes of saved models: their names in configs, and the automatic classes of transformers that build them."""

import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

Model = type[PreTrainedModel]


def class_named(name: object, config: PreTrainedConfig) -> Model | None:
    """Return the model class that a saved config names; None if there is none here.

    Classes that were registered with an automatic class come first, then those that transformers exports, then those
    beside the config class, which are parts of other models.

    Args:
        name: entry of `architectures` in the config.
        config: the config of the model.
    """
    if not isinstance(name, str):
        return None
    found = [*_registered(config), getattr(transformers, name, None)]
    found += [getattr(module, name, None) for module in _modules_beside(config)]
    models: list[Any] = [each for each in found if _is_model(each)]
    return next((each for each in models if each.__name__ == name), None)


def saved_class(model: PreTrainedModel) -> Model | None:
    """Return the class to load a model with: its own, or the nearest that it extends and that can be found by name."""
    bases = [base for base in type(model).__mro__ if _is_model(base)]
    return next((base for base in bases if class_named(base.__name__, model.config) is base), None)


def automatic_for(model: Model, config: PreTrainedConfig) -> list[str]:
    """Return the names of the automatic classes that build `model` from `config`; `AutoModel` if there is none."""
    return [name for name, made in _made(config) if made is model] or ["AutoModel"]


def _registered(config: PreTrainedConfig) -> Iterator[Model]:
    return (made for _, made in _made(config))


def _made(config: PreTrainedConfig) -> Iterator[tuple[str, Model]]:
    """Yield the name of every automatic class of models, with each model class that it builds from `config`."""
    kind: Any = getattr(type(config), "plain", type(config))
    for name, automatic in vars(modeling_auto).items():
        mapping = getattr(automatic, "_model_mapping", None)
        if isinstance(automatic, type) and mapping is not None and kind in mapping:
            made = mapping[kind]
            yield from ((name, each) for each in (made if isinstance(made, tuple) else (made,)))


def _modules_beside(config: PreTrainedConfig) -> Iterator[Any]:
    """Yield the modules with models in the package of transformers that defines the config class."""
    package = next(
        kind.__module__.rpartition(".")[0]
        for kind in type(config).__mro__
        if kind.__module__.startswith("transformers.")
    )
    for module in pkgutil.iter_modules(getattr(sys.modules[package], "__path__", ())):
        if module.name.startswith("modeling_"):
            yield import_module(f"{package}.{module.name}")


def _is_model(found: object) -> bool:
    """Return True for a class of models that can run, unlike the base classes of a family."""
    is_class = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return is_class and found.forward is not PreTrainedModel.forward  # type: ignore[attr-defined]
