"""Recovery within a training run: the trained parameters, their optimizer, the loss and the final model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CheckpointError, RecoveryError
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.registry import Factored, trained_form
from zssvd_lightning.model import adapters
from zssvd_lightning.model.logits import logits_of
from zssvd_lightning.model.replace import factored_layers
from zssvd_lightning.model.targets import matches
from zssvd_lightning.recovery.dressing import dress, needs_adapter, refuse_nothing
from zssvd_lightning.recovery.judge import Judge
from zssvd_lightning.recovery.pace import Pace
from zssvd_lightning.recovery.rollback import Rollback
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.recovery.stored_form import factors_of, pivots_of
from zssvd_lightning.recovery.teachers import (
    Call,
    DenseTeacher,
    SavedPredictions,
    Teacher,
    has_encoder,
    teacher_of,
    teacher_of_saved,
    teacher_to_save,
)
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.strategies import StrategyAdapter


class RecoveryRun:
    """One recovery, from FACTORIZE to the end of the fit.

    Args:
        settings: method of recovery and its settings.

    Attributes:
        active: True while the recovery trains the module. `began` is the global step of its current stage.
        divergence: divergence from the teacher at the latest batch (nats).
        rollback: copy of the last weights that gave finite gradients.
        horizon: optimizer steps of the recovery, and the `max_steps` and `max_epochs` they follow from.
        over: True once the recovery has ended while the Trainer still has its optimizers.
        judge: comparison of the states on held-out batches; None without such batches.
        pace: clock until the number of steps in `settings.minutes` is known; None otherwise.
        steps: that number; None until it is known, or without a limit in time.
    """

    def __init__(self, settings: Recovery) -> None:
        self.settings = settings
        self.active = False
        self.stage = 0
        self.began = 0
        self.divergence: Tensor | None = None
        self.rollback = Rollback(settings.lr)
        self.over = False
        self.judge: Judge | None = None
        self.pace: Pace | None = None
        self.steps: int | None = None
        self.first_step = 0
        self.horizon: tuple[float, int, int | None] | None = None
        self._were_trainable: list[str] = []
        self._stored: dict[str, dict[str, Any]] = {}
        self._teacher: Teacher | None = None
        self._of_teacher: dict[str, Tensor] | None = None
        self._of_judge: Mapping[str, Any] | None = None
        self._call: Call | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Factors trained in the current stage."""
        return self.settings.stages[self.stage]

    def take_teacher(
        self, adapter: StrategyAdapter, student: nn.Module, originals: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Copy the dense model as teacher, or open the folder with its saved predictions. Collective.

        Args:
            adapter: adapter of the run's strategy.
            student: the model, whose layers are still dense but have truncated weights.
            originals: name of each layer in `student` and its original weight (m, n).

        Raises:
            TeacherError: see `refuse_recovery`.
        """
        if not self.settings.keeps_teacher:
            self._teacher = SavedPredictions(self.settings.teacher)
            return
        self._teacher = teacher_of(adapter, student, originals, self._dtype)

    def sync_requires_grad(self, module: nn.Module) -> None:
        """Record which parameters of the module require gradients, while its layers are still dense."""
        self._were_trainable = [name for name, p in module.named_parameters() if p.requires_grad]

    def dress(self, name: str, layer: Factored) -> Factored:
        """Return a layer prepared for the current stage, while it is still whole; see `dressing.dress`."""
        if self.stage == 0 and self.settings.chooses(name):
            if self.settings.trains_pivots_as_factors and not isinstance(layer, LowRankLinear):
                self._stored[name] = layer.spec
                layer = factors_of(layer)
            self.settings.prepare(layer)
        dress(self.settings, name, layer, self.stage)
        return layer

    def reduced(self, module: nn.Module) -> str | None:
        """Return a warning if low-rank layers of a module are trained less than the settings ask for, else None."""
        chosen = {name: layer for name, layer in factored_layers(module) if self.settings.chooses(name)}
        return self.settings.reduced(chosen)

    def begin(self, module: nn.Module, step: int) -> None:
        """Start the recovery and freeze all parameters that are not trained.

        Args:
            module: the module to train, with its low-rank layers.
            step: global step at which the recovery starts.

        Raises:
            RecoveryError: no parameter is left to train, or a pattern of `also_train` matches only low-rank layers.
        """
        self.active, self.began, self.over, self.horizon = True, step, False, None
        self.first_step, self.steps = step, None
        self.freeze(module)
        for pattern in self.settings.also_train:
            if not any(p.requires_grad and matches(name, pattern) for name, p in module.named_parameters()):
                raise RecoveryError(f"recovery.also_train has {pattern!r}, which matches low-rank layers alone")

    def freeze(self, module: nn.Module) -> None:
        """Set `requires_grad` on the trained parameters and on no others.

        Raises:
            RecoveryError: there are no trained parameters.
        """
        trained = set(self._trained(module))
        if not trained:
            refuse_nothing(self.settings, len(ranks_of(module)))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)

    def optimizer(self, module: nn.Module, steps: float) -> Any:
        """Return the optimizer and schedule in the form of `configure_optimizers`, which they replace.

        Args:
            module: the module in training.
            steps: number of optimizer steps of the whole recovery; infinite if unknown.

        Raises:
            RecoveryError: the number of steps is unknown, but the schedule or the stages need it.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        return self.settings.optimizer(parameters, self._steps_of_stage(steps))

    def stage_is_over(self, step: int, steps: float) -> bool:
        """Return True if the next stage begins at this step.

        Args:
            step: global step.
            steps: number of optimizer steps of the whole recovery.
        """
        more = self.stage + 1 < len(self.settings.stages)
        return self.active and more and step - self.began >= self._steps_of_stage(steps)

    def next_stage(self, module: nn.Module, adapter: StrategyAdapter, step: int) -> None:
        """Merge the adapters and start to train the factors of the next stage. Collective.

        Raises:
            DivergedError: a trained weight is not finite.
        """
        self.rollback.check_weights(module, adapter.team)
        self.stage += 1
        self.rollback.forget()
        for name, layer in list(factored_layers(module)):
            if layer.adapter is not None or needs_adapter(self.settings, name, layer, self.stage):
                new = adapters.merged(layer, adapter.whole)
                self.dress(name, new)
                adapter.replace(module, layer, new)
        self.began = step
        self.freeze(module)

    def finish(self, module: nn.Module, adapter: StrategyAdapter, *, merge: bool) -> None:
        """Merge adapters if `merge` is True, and restore the `requires_grad` flags. Collective if `merge` is True."""
        try:
            if merge:
                self._store(module, adapter)
                adapters.merge_adapters(module, adapter.replace, adapter.whole)
                adapter.discard_replaced()
                mark(module)
        finally:
            self.let_go(module)
            adapter.sync_requires_grad()

    def _store(self, module: nn.Module, adapter: StrategyAdapter) -> None:
        """Put layers of pivots back in place of the factors that they were trained as. Collective."""
        for name, spec in self._stored.items():
            layer: Any = module.get_submodule(name)
            form: Any = trained_form(spec["kind"])
            ordered = spec.get("ordered", True)
            new = pivots_of(layer, form, ordered=ordered, whole=adapter.whole, team=adapter.team)
            adapter.replace(module, layer, new)
        self._stored = {}

    def start_judging(self, judge: Judge | None, module: nn.Module) -> None:
        """Start to compare states on held-out batches, from the present one or that of a checkpoint.

        Raises:
            CheckpointError: the checkpoint is of a recovery that was judged on other batches.
        """
        saved, self._of_judge, self.judge = self._of_judge, None, judge
        if judge is None and saved is not None:
            raise CheckpointError(
                "the checkpoint is of a recovery that is judged on held-out batches, and this callback has none; pass "
                "the same held_out"
            )
        if judge is not None and saved is not None:
            judge.load_state_dict(saved)
        elif judge is not None:
            judge.begin(module)

    def let_go(self, module: nn.Module) -> None:
        """Restore the `requires_grad` flags and release the teacher and the rollback copy.

        Parameters of low-rank layers, including adapters that stay, get the flag of the dense weight or bias.
        """
        before = set(self._were_trainable)
        dense_name = {
            f"{name}.{part}": f"{name}.{'bias' if part.endswith('bias') else 'weight'}"
            for name, layer in factored_layers(module)
            for part, _ in layer.named_parameters()
        }
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in before or dense_name.get(name, name) in before)
        self.active, self.over = False, True
        self._teacher, self._call, self.judge, self.pace = None, None, None, None
        self.rollback.forget()

    def watch(self, student: nn.Module) -> Callable[[], None]:
        """Record the forward passes of a model in training; return a function that stops the recording."""

        def note(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if self.active and module.training and torch.is_grad_enabled():
                self._call = Call(args, kwargs, logits_of(output), has_encoder(module))

        return student.register_forward_hook(note, with_kwargs=True).remove

    def loss(self, own: Tensor, mask: Tensor | None) -> Tensor:
        """Return the loss to train on, given the loss of `training_step` and the latest recorded forward pass.

        Args:
            own: loss that `training_step` returned. It is what counts where gradients are off, as for held-out batches.
            mask: positions (B, T) of the inputs that are not padding; None for all.

        Raises:
            RecoveryError: no forward pass was recorded.
        """
        call, self._call = self._call, None
        if not self.active or not self.settings.distills or not torch.is_grad_enabled():
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
        """Return the state as plain types and tensors. Collective if the teacher is in memory."""
        return {
            "settings": self.settings.to_dict(),
            "active": self.active,
            "over": self.over,
            "stage": self.stage,
            "began": self.began,
            "first_step": self.first_step,
            "steps": self.steps,
            "judge": self._of_judge if self.judge is None else self.judge.state_dict(),
            "horizon": None if self.horizon is None else list(self.horizon),
            "were_trainable": list(self._were_trainable),
            "stored": {name: dict(spec) for name, spec in self._stored.items()},
            "teacher": self._teacher_to_save(team),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, except for the teacher, which `resume` restores."""
        self.active, self.stage, self.began = state["active"], state["stage"], state["began"]
        self.first_step, self.steps = state.get("first_step", self.began), state.get("steps")
        self._of_judge = state.get("judge")
        self.horizon = None if state["horizon"] is None else tuple(state["horizon"])
        self._were_trainable = list(state["were_trainable"])
        self._stored = {name: dict(spec) for name, spec in state.get("stored", {}).items()}
        self._of_teacher = dict(state["teacher"])

    def resume(self, adapter: StrategyAdapter, student: nn.Module | None) -> None:
        """Rebuild the teacher from the model and the saved weights. Collective.

        Raises:
            TeacherError: see `refuse_recovery`.
        """
        saved, self._of_teacher = self._of_teacher or {}, None
        if not self.active or student is None or self._teacher is not None:
            return
        if not self.settings.keeps_teacher:
            self._teacher = SavedPredictions(self.settings.teacher)
            return
        self._teacher = teacher_of_saved(adapter, student, saved, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.settings.teacher_dtype)
        return dtype

    @property
    def steps_of_stage(self) -> float:
        """Number of steps of the current stage of a recovery that is limited in time, once it is known."""
        return math.inf if self.steps is None else self._steps_of_stage(self.steps)

    def _steps_of_stage(self, steps: float) -> float:
        stages = len(self.settings.stages)
        if stages == 1 or math.isinf(steps):
            return steps
        first = math.ceil(steps / stages)
        return first if self.stage == 0 else steps - first

    def _trained(self, module: nn.Module) -> Iterator[str]:
        before = set(self._were_trainable)
        for name, layer in factored_layers(module):
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
        return teacher_to_save(self._teacher, team)
