"""Adapters on new layers for a recovery, and the same on layers without values, to refuse it before calibration."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from zssvd_lightning.errors import RecoveryError, TeacherError
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.dense_copy import copied, refuse_too_large
from zssvd_lightning.model.targets import matches
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.recovery.teachers import SavedPredictions, has_encoder

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


def refuse_recovery(
    settings: Recovery,
    classes: Mapping[str, Sequence[type[Factored]]],
    forms: Forms,
    module: nn.Module,
    student: nn.Module | None,
    processes: int,
) -> None:
    """Raise the errors that can be detected before calibration.

    Args:
        settings: settings of the recovery.
        classes: names of the layers to compress, and the possible classes of those that replace them.
        forms: forms that each layer to compress may get.
        module: the module to train.
        student: the model whose logits will be compared; None without distillation.
        processes: number of processes that would share a copy of the student.

    Raises:
        TargetError: a pattern of layers matches nothing.
        RecoveryError: a pattern of parameters matches no parameter that now requires gradients, or the forms of the
            layers leave nothing to train or are too small for the method.
        TeacherError: the teacher does not fit into memory, cannot be copied or read, or is another model.
    """
    settings.refuse_layers(classes)
    also = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for pattern in settings.also_train:
        if not any(matches(name, pattern) for name in also):
            raise RecoveryError(
                f"recovery.also_train has {pattern!r}, which matches no parameter that requires gradients"
            )
    refuse_forms(settings, forms)
    if student is None:
        return
    if settings.keeps_teacher:
        dtype = getattr(torch, settings.teacher_dtype)
        refuse_too_large(student, dtype, processes)
        copied(student, dtype, lambda parameter: torch.empty(parameter.shape, device="meta"))
    elif has_encoder(student):
        raise TeacherError("saved predictions do not know what a decoder was given; set recovery.teacher to 'memory'")
    else:
        SavedPredictions(settings.teacher).refuse_other(student)


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
