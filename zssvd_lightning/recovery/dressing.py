"""Adapters on new layers for a recovery, and the same on layers without values, to refuse it before calibration."""

from collections.abc import Mapping, Sequence

from zssvd_lightning.errors import RecoveryError
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.recovery.settings import Recovery

Forms = Mapping[str, Sequence[Factored]]
"""Name -> forms that a layer may get, without values. No form for a layer that stays dense."""


def dress(settings: Recovery, name: str, layer: Factored, stage: int) -> None:
    """Add the adapter of a stage to a layer, while the layer is still whole.

    Args:
        settings: settings of the recovery.
        name: qualified name of the layer.
        layer: the layer.
        stage: number of the stage that begins.

    Raises:
        RecoveryError: the layer is too small for the adapter of this stage or, at the first stage, of a later one.
        ConfigError: the method does not suit the form of the layer.
    """
    if not settings.chooses(name):
        return
    settings.refuse_storage(layer.kind)
    if stage == 0:
        for parts in settings.stages[1:]:
            _attach(settings, name, type(layer).like(layer, rank=layer.rank), parts)
    _attach(settings, name, layer, settings.stages[stage])


def needs_adapter(settings: Recovery, name: str, layer: Factored, stage: int) -> bool:
    """Return True if `dress` adds an adapter to a layer in a stage."""
    adapter = settings.adapter(settings.stages[stage], name, layer) if settings.chooses(name) else None
    return adapter is not None and bool(adapter.parts_of(name, layer))


def refuse_forms(settings: Recovery, forms: Forms) -> None:
    """Raise the errors of `dress` and `refuse_nothing` that are certain for layers of these possible forms.

    Args:
        settings: settings of the recovery.
        forms: possible forms of each layer. Ranks are certain if those of each layer all have the same.
    """
    certain = all(len({layer.rank for layer in possible}) <= 1 for possible in forms.values())
    refused: RecoveryError | None = None
    trains = False
    for name, possible in forms.items():
        errors = []
        for layer in possible if settings.chooses(name) else ():
            try:
                dress(settings, name, layer, 0)
            except RecoveryError as error:
                errors.append(error)
            else:
                trains |= any(settings.trains(part, settings.stages[0]) for part, _ in layer.named_parameters())
        if certain and errors and len(errors) == len(possible):
            raise errors[0]
        refused = errors[-1] if errors else refused
    if not trains and not settings.also_train:
        if refused is not None:
            raise RecoveryError(f"no rank that layers may get suits this recovery: {refused}") from refused
        refuse_nothing(settings, sum(map(bool, forms.values())))


def refuse_nothing(settings: Recovery, layers: int) -> None:
    """Raise RecoveryError for a recovery that has nothing to train, in a model with so many low-rank layers."""
    raise RecoveryError(
        f"recovery by {settings.method} has nothing to train: {layers} layers are low-rank and targets is "
        f"{settings.targets}"
    )


def _attach(settings: Recovery, name: str, layer: Factored, parts: Sequence[str]) -> None:
    adapter = settings.adapter(parts, name, layer)
    if adapter is not None and adapter.parts_of(name, layer):
        adapter.attach(name, layer, empty=next(layer.parameters()).is_meta)
