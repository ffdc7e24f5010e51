"""Errors of a recovery that can be detected before calibration."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from zssvd_lightning.errors import RecoveryError, TeacherError
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.dense_copy import copied, refuse_too_large
from zssvd_lightning.model.targets import matches
from zssvd_lightning.recovery.dressing import Forms, refuse_forms
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.recovery.teachers import SavedPredictions, has_encoder


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
