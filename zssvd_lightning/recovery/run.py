"""A recovery inside a training run: what becomes trainable, by which optimizer, towards what, and what is left of it.

Shapes: see `distillation`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CheckpointError, RecoveryError, TeacherError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model import adapters
from zssvd_lightning.model.dense_copy import copied, refuse_too_large
from zssvd_lightning.model.logits import logits_of
from zssvd_lightning.model.targets import Target, local_part, matches
from zssvd_lightning.recovery.rollback import Rollback
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.recovery.teachers import Call, DenseTeacher, SavedPredictions, Teacher, has_encoder
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.strategies import StrategyAdapter


class RecoveryRun:
    """One recovery, from FACTORIZE to the end of the fit.

    Args:
        settings: how to recover.

    Attributes:
        active: whether the module is trained by it.
        began: the global step at which its stage began.
        divergence: from the teacher at the latest batch (nats).
        rollback: the weights that gave finite gradients, for when others do not.
        horizon: its optimizer steps, and the `max_steps` and `max_epochs` they follow from.
        over: whether it ended, and the Trainer's optimizers are still those it was trained by.
    """

    def __init__(self, settings: Recovery) -> None:
        self.settings = settings
        self.active = False
        self.stage = 0
        self.began = 0
        self.divergence: Tensor | None = None
        self.rollback = Rollback(settings.lr)
        self.over = False
        self.horizon: tuple[float, int, int | None] | None = None
        self._were_trainable: list[str] = []
        self._teacher: Teacher | None = None
        self._of_teacher: dict[str, Tensor] | None = None
        self._call: Call | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The factors trained now."""
        return self.settings.stages[self.stage]

    def refuse(self, names: list[str], module: nn.Module, student: nn.Module | None, processes: int) -> None:
        """Raises what can be told before calibration is spent.

        Args:
            names: of the layers that are to be compressed.
            module: that will be trained.
            student: whose logits will be compared; None without distillation.
            processes: that would share a copy of it.

        Raises:
            TargetError: patterns of layers match nothing.
            RecoveryError: patterns of parameters match nothing that is trained now.
            TeacherError: the teacher does not fit, cannot be copied or read, or is of another model.
        """
        self.settings.refuse_layers(names)
        also = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        for pattern in self.settings.also_train:
            if not any(matches(name, pattern) for name in also):
                raise RecoveryError(
                    f"recovery.also_train has {pattern!r}, which matches no parameter that requires gradients"
                )
        if student is None:
            return
        if self.settings.keeps_teacher:
            refuse_too_large(student, self._dtype, processes)
            copied(student, self._dtype, lambda parameter: torch.empty(parameter.shape, device="meta"))
        elif has_encoder(student):
            raise TeacherError(
                "saved predictions do not know what a decoder was given; set recovery.teacher to 'memory'"
            )
        else:
            SavedPredictions(self.settings.teacher).refuse_other(student)

    def take_teacher(self, adapter: StrategyAdapter, student: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Keeps the dense model, or opens the folder of its predictions. Collective.

        Args:
            adapter: the strategy of the run.
            student: dense still, but with truncated weights.
            originals: the weights (m, n) of before, by the name of their layer in `student`.

        Raises:
            TeacherError: see `refuse`.
        """
        if not self.settings.keeps_teacher:
            self._teacher = SavedPredictions(self.settings.teacher)
            return
        with adapter.team.together():
            refuse_too_large(student, self._dtype, adapter.processes_of_a_copy)
        teacher = adapter.dense_copy(student, self._dtype)
        with torch.no_grad():
            for name, W in originals.items():
                layer: Any = teacher.get_submodule(name)
                Target(name, layer).assign(W)
        self._teacher = DenseTeacher(teacher)

    def sync_requires_grad(self, module: nn.Module) -> None:
        """Notes what was trained of a module that is dense still."""
        self._were_trainable = [name for name, p in module.named_parameters() if p.requires_grad]

    def dress(self, name: str, layer: Factored) -> None:
        """Puts on a new layer what is trained of it, while it is whole.

        Raises:
            RecoveryError: the layer is of too low a rank, for this stage or for a later one.
            ConfigError: it has no factors, on which something is to be put.
        """
        if not self.settings.chooses(name):
            return
        if self.stage == 0:
            self.settings.prepare(layer)
            for parts in self.settings.stages[1:]:
                self._attach(name, type(layer).like(layer, rank=layer.rank), parts, empty=True)
        self._attach(name, layer, self.parts)

    def begin(self, module: nn.Module, step: int) -> None:
        """Freezes all that is not trained. Raises RecoveryError when nothing is left."""
        self.active, self.began, self.over, self.horizon = True, step, False, None
        self.freeze(module)
        for pattern in self.settings.also_train:
            if not any(p.requires_grad and matches(name, pattern) for name, p in module.named_parameters()):
                raise RecoveryError(f"recovery.also_train has {pattern!r}, which matches low-rank layers alone")

    def freeze(self, module: nn.Module) -> None:
        """Has gradients come to what is trained, and to nothing else."""
        trained = set(self._trained(module))
        if not trained:
            raise RecoveryError(
                f"recovery by {self.settings.method} has nothing to train: {len(ranks_of(module))} layers are low-rank "
                f"and targets is {self.settings.targets}"
            )
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)

    def optimizer(self, module: nn.Module, steps: float) -> Any:
        """What `configure_optimizers` returns in its place.

        Args:
            module: that is trained.
            steps: optimizer steps of the whole recovery.

        Raises:
            RecoveryError: nobody knows how many they are, but schedule or stages go by it.
        """
        if math.isinf(steps) and len(self.settings.stages) > 1:
            raise RecoveryError("two_step has to know when training ends; set max_steps or max_epochs")
        parameters = [p for p in module.parameters() if p.requires_grad]
        return self.settings.optimizer(parameters, self._steps_of_stage(steps))

    def stage_is_over(self, step: int, steps: float) -> bool:
        """Whether the next stage begins.

        Args:
            step: the global one.
            steps: of the whole recovery.
        """
        more = self.stage + 1 < len(self.settings.stages)
        return self.active and more and step - self.began >= self._steps_of_stage(steps)

    def next_stage(self, module: nn.Module, adapter: StrategyAdapter, step: int) -> None:
        """Merges what was trained, and begins with the next factors. Collective.

        Raises:
            DivergedError: it is not finite.
        """
        self.rollback.check_weights(module, adapter.team)
        self.stage += 1
        self.rollback.forget()
        for name, layer in adapters.on(module).items():
            new = adapters.merged(layer, adapter.whole)
            self.dress(name, new)
            adapter.replace(module, layer, new)
        self.began = step
        self.freeze(module)

    def finish(self, module: nn.Module, adapter: StrategyAdapter, *, merge: bool) -> None:
        """Leaves a plain low-rank model, with flags as they were. Collective with `merge`."""
        try:
            if merge:
                adapters.merge_adapters(module, adapter.replace, adapter.whole)
                adapter.discard_replaced()
                mark(module)
        finally:
            self.let_go(module)
            adapter.sync_requires_grad()

    def let_go(self, module: nn.Module) -> None:
        """Has flags be what they were, and those of adapters that stay be set."""
        before = set(self._were_trainable)
        dense_name = {
            f"{name}.{part}": f"{name}.{'bias' if part.endswith('bias') else 'weight'}"
            for name, layer in _low_rank(module)
            for part, _ in layer.named_parameters()
        }
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(dense_name.get(name, name) in before)
        self.active, self.over = False, True
        self._teacher, self._call = None, None
        self.rollback.forget()

    def watch(self, student: nn.Module) -> Callable[[], None]:
        """Notes the forward passes of a model in training; returns what ends that."""

        def note(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if self.active and module.training and torch.is_grad_enabled():
                self._call = Call(args, kwargs, logits_of(output), has_encoder(module))

        return student.register_forward_hook(note, with_kwargs=True).remove

    def loss(self, own: Tensor, mask: Tensor | None) -> Tensor:
        """The loss to train on, from that of `training_step` and its latest forward pass.

        Raises:
            RecoveryError: the model did not run.
        """
        call, self._call = self._call, None
        if not self.active or not self.settings.distills:
            return own
        if call is None or self._teacher is None:
            raise RecoveryError("training_step gave a loss without a forward pass of the model that is distilled into")
        loss = self._teacher.divergence(call, mask, self.settings.temperature)
        self.divergence = loss.detach()
        if self.settings.loss == "distill":
            return loss
        share = self.settings.distill_weight
        return (1 - share) * own + share * loss

    def state_dict(self, team: Team | None) -> dict[str, Any]:
        """Plain types and tensors. Collective where a teacher is in memory."""
        return {
            "settings": self.settings.to_dict(),
            "active": self.active,
            "over": self.over,
            "stage": self.stage,
            "began": self.began,
            "horizon": None if self.horizon is None else list(self.horizon),
            "were_trainable": list(self._were_trainable),
            "teacher": self._teacher_to_save(team),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state; `resume` goes on with its module."""
        self.active, self.stage, self.began = state["active"], state["stage"], state["began"]
        self.horizon = None if state["horizon"] is None else tuple(state["horizon"])
        self._were_trainable = list(state["were_trainable"])
        self._of_teacher = dict(state["teacher"])

    def resume(self, adapter: StrategyAdapter, student: nn.Module | None) -> None:
        """Makes the teacher anew, from the model and the weights saved. Collective.

        Raises:
            TeacherError: see `refuse`.
        """
        saved, self._of_teacher = self._of_teacher or {}, None
        if not self.active or student is None or self._teacher is not None:
            return
        if not self.settings.keeps_teacher:
            self._teacher = SavedPredictions(self.settings.teacher)
            return
        teacher = adapter.dense_copy(student, self._dtype)
        values: dict[str, Tensor] = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
        with torch.no_grad():
            for name, value in saved.items():
                whole = isinstance(values[name], nn.Parameter)
                local_part(values[name].detach()).copy_(adapter.team.part(value) if whole else value)
        self._teacher = DenseTeacher(teacher)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.settings.teacher_dtype)
        return dtype

    def _attach(self, name: str, layer: Factored, parts: tuple[str, ...], *, empty: bool = False) -> None:
        self.settings.refuse_storage(layer.kind)
        adapter = self.settings.adapter(parts, layer.rank)
        if adapter is not None and isinstance(layer, LowRankLinear) and adapter.parts_of(name):
            adapter.attach(name, layer, empty=empty)
            self.settings.refuse_rank(name, layer)

    def _steps_of_stage(self, steps: float) -> float:
        stages = len(self.settings.stages)
        if stages == 1 or math.isinf(steps):
            return steps
        first = math.ceil(steps / stages)
        return first if self.stage == 0 else steps - first

    def _trained(self, module: nn.Module) -> Iterator[str]:
        before = set(self._were_trainable)
        for name, layer in _low_rank(module):
            if self.settings.chooses(name):
                yield from (f"{name}.{p}" for p, _ in layer.named_parameters() if self.settings.trains(p, self.parts))
        for name, _ in module.named_parameters():
            if name in before and any(matches(name, pattern) for pattern in self.settings.also_train):
                yield name

    def _teacher_to_save(self, team: Team | None) -> dict[str, Tensor]:
        if self._of_teacher is not None:
            return self._of_teacher
        if team is None or not isinstance(self._teacher, DenseTeacher):
            return {}
        found = {name: buffer.cpu() for name, buffer in self._teacher.model.named_buffers()}
        for name, parameter in self._teacher.model.named_parameters():
            value = team.weight_to_save(local_part(parameter), parameter.shape[0]) if parameter.dim() else parameter
            if value is not None:
                found[name] = value.detach()
        return found


def refuse_other_recovery(state: Mapping[str, Any] | None, mine: RecoveryRun | None) -> None:
    """Raises CheckpointError for a checkpoint of the recovery, or of after it, by another one.

    Args:
        state: of the recovery it was taken in; None when the factors were trained by the module's own optimizer.
        mine: the recovery that is to go on.
    """
    if state is not None and state["over"]:
        raise CheckpointError(
            "the checkpoint was saved after its fit, when the recovery was over; go on from a checkpoint of the fit "
            "itself"
        )
    saved = None if state is None or not state["active"] else state["settings"]
    settings = None if mine is None else mine.settings.to_dict()
    if saved != settings and (saved is not None or state is None):
        raise CheckpointError(
            f"the checkpoint is of a training of the factors with recovery={saved}, and this callback has {settings}; "
            "go on with the same, or start from a checkpoint of before it"
        )


def _low_rank(module: nn.Module) -> Iterator[tuple[str, Factored]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Factored))
