"""Callback that compresses a model within the Trainer of transformers.

| event         | action                                                                                        |
|---------------|-----------------------------------------------------------------------------------------------|
| init_end      | make the model follow the structure of checkpoints that it loads                              |
| train_begin   | refuse what cannot work; compress if training starts at `start_step`, or after it             |
| step_end      | compress when `start_step` optimizer steps are done                                           |
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Unpack, cast
from weakref import ref

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zssvd_lightning._contexts import same_random_numbers
from zssvd_lightning._types import of_type
from zssvd_lightning._validation import require
from zssvd_lightning.calibration.batches import length_of
from zssvd_lightning.compression.pipeline import Asked, compress, coverage_of
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.contradictions import refuse_for_several
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CheckpointError, ContradictionError, UnsupportedTrainingError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.serialization.state_dict import match_structure
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.transformers_trainer.batches import TrainingBatches
from zssvd_lightning.transformers_trainer.groups import OpenGroups
from zssvd_lightning.transformers_trainer.precision import without_fp16
from zssvd_lightning.transformers_trainer.processes import team_of, wrap_anew
from zssvd_lightning.transformers_trainer.refusals import refuse

logger = logging.getLogger(__name__)

BATCHES = 64
"""Number of calibration batches, where none is given."""


class ZSSVDTrainerCallback(TrainerCallback):
    """Compress the model of a transformers Trainer at the start of training, or between two of its steps.

    Calibration reads batches of the training data in addition to those that the Trainer reads. The Trainer takes as
    many steps as without the callback, on the same batches. After the compression it trains the factors, with its own
    optimizer, schedule and loss: they are in the parameter groups where the weights were.

    Checkpoints that are saved after the compression hold the compressed model. To resume from one, build the dense
    model and the Trainer as before; the layers follow the checkpoint. `from_pretrained` loads such a folder too.

    Under DDP, all processes compress the model together, each on batches of its own. Numbers of batches are those of
    one process.

    Args:
        config: settings of the compression; None to build them from `preset` and `settings`.
        preset: name of a preset; None for `best`.
        start_step: number of optimizer steps before the compression.
        calibration_batches: number of batches, from the first, that calibration uses; None for 64, or all if there are
            fewer. Gradient steps use the batches after these, and start again at the first batch after the last.
        batches: calibration batches of this process, as a list or a DataLoader; None for those of the training data.
        progress: draw progress bars.
        settings: settings of `CompressionConfig`, such as `prune_ratio=0.3`, and `loss`, `mask` and `terms` of
            `BatchReading`. Without a `loss`, calibration goes by the loss that the model returns, whatever the Trainer
            computes from its outputs.

    Attributes:
        report: report of the compression; None before it.

    Raises:
        ConfigError: a setting is invalid, or is one of a storage in 8 bits, which cannot be trained.

    Example:
        >>> callback = ZSSVDTrainerCallback(prune_ratio=0.3, start_step=100)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: CompressionConfig | None = None,
        *,
        preset: str | None = None,
        start_step: int = 0,
        calibration_batches: int | None = None,
        batches: Iterable[Any] | None = None,
        progress: bool = True,
        **settings: Unpack[Asked],
    ) -> None:
        of_type(int, start_step, "start_step")
        of_type(int | None, calibration_batches, "calibration_batches")
        require(start_step >= 0, "start_step", start_step, "0 or more")
        if calibration_batches is not None:
            require(calibration_batches > 0, "calibration_batches", calibration_batches, "1 or more")
        asked: dict[str, Any] = dict(settings)
        self._reading = {name: asked.pop(name) for name in ("loss", "mask", "terms") if name in asked}
        self.config = CompressionConfig.asked(config, preset, cast("Settings", asked))
        if self.config.form.rounds:
            raise ContradictionError(
                f"storage {self.config.storage!r} rounds layers to 8 bits, which cannot be trained; take 'factors' or "
                "'pivoted', and call quantize(model) after training"
            )
        self.start_step = start_step
        self.calibration_batches = calibration_batches
        self.batches = batches
        self.progress = progress
        self.report: Report | None = None
        self._compressed: ref[nn.Module] | None = None
        self._follower: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Make the layers of the model follow the checkpoints that it loads."""
        if isinstance(model, nn.Module):
            self._follower = model.register_load_state_dict_pre_hook(_follow)  # type: ignore[no-untyped-call]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Refuse what cannot work before the first batch. Compress if training begins at `start_step` or after it.

        Raises:
            UnsupportedTrainingError: the run is of a kind in which the model cannot be compressed.
            ProcessFailedError: another process has an error.
            CheckpointError: the run resumes after the compression, and the model has not become low-rank.
            ZSSVDError: what `compress` raises. Model and optimizer are then as before.
        """
        if self._has_compressed(model):
            return
        if state.global_step > 0 and state.global_step >= self.start_step:
            if not any(isinstance(layer, CompressedLinear) for layer in model.modules()):
                raise CheckpointError(
                    f"training resumes at step {state.global_step}, after the compression at step {self.start_step}, "
                    "but no layer is low-rank: the checkpoint was saved by a run without this callback, or the "
                    "callback was added after the Trainer was made; pass it as Trainer(..., callbacks=[callback])"
                )
            OpenGroups(others["optimizer"], model)  # one that was made before the layers followed the checkpoint
            logger.warning(
                "the checkpoint of step %d holds a compressed model, which trains on as it is: prune_ratio and other "
                "settings of the callback are not used",
                state.global_step,
            )
            return
        refuse(args, model)
        team = team_of(args)
        with team.together():
            if self.start_step >= state.max_steps:
                raise UnsupportedTrainingError(
                    f"start_step is {self.start_step}, and training ends after step {state.max_steps}; lower it, or "
                    "call compress(model, batches) after training"
                )
            refuse_for_several(self.config, team.size, statistics=False, resumes=False)
            OpenGroups(others["optimizer"], model)
            self._calibration(others["train_dataloader"], team)
            coverage_of(model, self.config)
        if self.start_step == 0:
            self._compress(args, state, model, **others)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Compress after `start_step` steps. Raises ZSSVDError as `compress` does; the model is then as before."""
        if state.global_step == self.start_step and not self._has_compressed(model):
            self._compress(args, state, model, **others)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Remove the hook of `on_init_end`."""
        if self._follower is not None:
            self._follower.remove()
            self._follower = None

    def _has_compressed(self, model: nn.Module) -> bool:
        return self._compressed is not None and self._compressed() is model

    def _calibration(self, train_dataloader: Any, team: Team) -> Iterable[Any]:
        return TrainingBatches(train_dataloader, team) if self.batches is None else self.batches

    def _compress(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
        **others: Any,
    ) -> None:
        team = team_of(args)
        with team.together():
            groups = OpenGroups(optimizer, model)
            batches = self._calibration(train_dataloader, team)
        count = self.calibration_batches
        if count is None:
            count = min(BATCHES, length_of(batches) or BATCHES)
        with same_random_numbers(), without_fp16(args, model):
            self.report = compress(
                model,
                batches,
                self.config,
                calibration_batches=count,
                refuse_diverged=False,
                team=team,
                progress=self.progress,
                **self._reading,
            )
        groups.follow()
        wrap_anew(model)
        self._compressed = ref(model)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None  # those of the dense model
        if team.rank == 0:
            logger.info("compressed after step %d:\n%s", state.global_step, self.report)


def _follow(model: nn.Module, weights: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Give a model the layers of the weights that it is about to load."""
    if not prefix:
        match_structure(model, weights, strict=False)
        mark(model)
