"""Dense copy of a model in memory as teacher: made of the original weights, saved and made again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.model.dense_copy import refuse_too_large
from zssvd_lightning.model.targets import Target, local_part
from zssvd_lightning.recovery.teachers import DenseTeacher
from zssvd_lightning.strategies import StrategyAdapter


def teacher_of(
    adapter: StrategyAdapter, student: nn.Module, originals: Mapping[str, Tensor], dtype: torch.dtype
) -> DenseTeacher:
    """Return a copy of a model with its original weights. Collective.

    Args:
        adapter: adapter of the run's strategy.
        student: the model, whose layers are still dense but have truncated weights.
        originals: original weights (m, n), by the name of their layer in `student`.
        dtype: floating-point type of the copy.

    Raises:
        TeacherError: the copy does not fit into memory.
    """
    with adapter.team.together():
        refuse_too_large(student, dtype, adapter.processes_of_a_copy)
    teacher = adapter.dense_copy(student, dtype)
    with torch.no_grad():
        for name, W in originals.items():
            layer: Any = teacher.get_submodule(name)
            Target(name, layer).assign(W)
    return DenseTeacher(teacher)


def teacher_of_saved(
    adapter: StrategyAdapter, student: nn.Module, saved: Mapping[str, Tensor], dtype: torch.dtype
) -> DenseTeacher:
    """Return the teacher that `teacher_to_save` saved, laid out like the student. Collective."""
    teacher = adapter.dense_copy(student, dtype)
    values: dict[str, Tensor] = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    with torch.no_grad():
        for name, value in saved.items():
            whole = isinstance(values[name], nn.Parameter)
            local_part(values[name].detach()).copy_(adapter.team.part(value) if whole else value)
    return DenseTeacher(teacher)


def teacher_to_save(teacher: DenseTeacher, team: Team) -> dict[str, Tensor]:
    """Return the weights and buffers of a teacher, in the form the team saves. Collective."""
    found = {name: buffer.cpu() for name, buffer in teacher.model.named_buffers()}
    for name, parameter in teacher.model.named_parameters():
        value = team.weight_to_save(local_part(parameter), parameter.shape[0]) if parameter.dim() else parameter
        if value is not None:
            found[name] = value.detach()
    return found
