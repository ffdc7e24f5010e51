"""Distillation: divergence of the low-rank model's predictions from those of the original dense model.

Shapes: logits (B, T, V), or (N, V) at the N positions that count; mask (B, T).
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._files import replacing_folder
from zssvd_lightning.calibration.batches import IGNORED_LABEL, token_mask
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import TeacherError
from zssvd_lightning.model.dense_copy import refuse_too_large
from zssvd_lightning.model.logits import logits_of
from zssvd_lightning.model.targets import Target, local_part
from zssvd_lightning.recovery.divergence import counted, divergence, divergence_from_top
from zssvd_lightning.strategies import StrategyAdapter

INDEX = "predictions.json"


ROWS_A_FILE = 64


class Call(NamedTuple):
    """Forward pass of the low-rank model in training."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor
    """Logits (B, T, V), with their autograd graph."""
    encodes: bool = False
    """True if the model is an encoder-decoder: inputs and their mask are the encoder's, logits the decoder's."""

    def mask(self, of_inputs: Tensor | None) -> Tensor | None:
        """Return the mask (B, T) of the logits that count, given the mask of the inputs; None for all."""
        labels = self.kwargs.get("labels")
        if self.encodes:
            return labels != IGNORED_LABEL if isinstance(labels, Tensor) else None
        return of_inputs

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return input ids (B, T) and the mask (B, T) of those that are not padding.

        Raises:
            TeacherError: the model was called without input ids.
        """
        ids = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise TeacherError("saved predictions are found by input_ids (B, T), which the model was not called with")
        mask = token_mask(self.kwargs)
        return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

    def keys(self) -> list[str]:
        """Return a key for each row: a digest of all its inputs except labels and padding."""
        ids, mask = self.rows()
        others = {k: v for k, v in self.kwargs.items() if isinstance(v, Tensor) and v.dim() and len(v) == len(ids)}
        for known in ("input_ids", "attention_mask", "labels"):
            others.pop(known, None)
        keys = []
        for row, counts in enumerate(mask):
            digest = sha256(ids[row][counts].cpu().long().numpy().tobytes())
            for name, value in sorted(others.items()):
                part = value[row][counts] if value.shape[1:2] == ids.shape[1:2] else value[row]
                digest.update(name.encode() + part.double().cpu().numpy().tobytes())
            keys.append(digest.hexdigest()[:32])
        return keys


class Teacher(Protocol):
    """Source of the predictions for distillation."""

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """Return the mean Kullback-Leibler divergence from the teacher's predictions (nats).

        Args:
            call: forward pass of the student.
            mask: positions (B, T) of the inputs that count; None for all.
            temperature: T, as in `divergence`.
        """
        ...


class DenseTeacher:
    """Teacher that is a dense model in memory.

    Args:
        model: dense model in evaluation mode, without gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dtype = next(model.parameters()).dtype

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """Run the dense model on the same inputs and return the divergence; see `Teacher`."""
        unused = () if call.encodes else ("labels",)  # encoder-decoders make decoder inputs from the labels
        kwargs = {key: self._cast(value) for key, value in call.kwargs.items() if key not in unused}
        device, low = call.logits.device.type, self._dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(device, self._dtype if low else torch.bfloat16, enabled=low):
            logits = logits_of(self.model(*map(self._cast, call.args), **kwargs))
        counting = call.mask(mask)
        return divergence(counted(call.logits, counting), counted(logits, counting), temperature)

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def teacher_of(
    adapter: StrategyAdapter, student: nn.Module, originals: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> DenseTeacher:
    """Return a copy of a model with its original weights. Collective.

    Args:
        adapter: adapter of the run's strategy.
        student: the model, whose layers are still dense but have truncated weights.
        originals: name of each layer in `student` and its original weight (m, n).
        dtype: floating-point type of the copy.

    Raises:
        TeacherError: the copy does not fit into memory.
    """
    with adapter.team.together():
        refuse_too_large(student, dtype, adapter.processes_of_a_copy)
    teacher = adapter.dense_copy(student, dtype)
    with torch.no_grad():
        for name, W in originals:
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


class SavedPredictions:
    """Teacher that reads the dense model's top k tokens and their probabilities from a folder.

    Args:
        folder: folder that `save_predictions` wrote.

    Raises:
        TeacherError: the folder does not exist or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            told = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self._file_of: dict[str, str] = told["rows"]
            self._vocabulary: int = told["vocabulary"]
            names = sorted(set(self._file_of.values()))
            self._files: dict[str, Any] = {n: safe_open(self.folder / n, framework="pt") for n in names}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TeacherError(
                f"recovery.teacher {str(folder)!r} holds no predictions: {error!r}; write them with save_predictions, "
                "or set it to 'memory'"
            ) from error

    def refuse_other(self, model: nn.Module) -> None:
        """Raise TeacherError if the vocabulary of a model has another size."""
        size = getattr(getattr(model, "config", None), "vocab_size", self._vocabulary)
        if size != self._vocabulary:
            raise TeacherError(
                f"{self.folder} has predictions over {self._vocabulary} tokens, but {type(model).__name__} has {size}; "
                "save those of the model that is compressed"
            )

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """Return the divergence with all tokens that were not saved merged into one; see `Teacher`."""
        there = call.rows()[1]
        indices, log_probabilities = (part.to(call.logits.device) for part in self._looked_up(call))
        counting = (there if mask is None else there & mask)[there]
        student = call.logits[there]
        if not counting.all():
            student, indices, log_probabilities = (p[counting] for p in (student, indices, log_probabilities))
        return divergence_from_top(student, indices.long(), log_probabilities, temperature)

    def _looked_up(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return token indices and log-probabilities, (N, k) each, at the N positions that are not padding."""
        indices, log_probabilities = [], []
        ids, _ = call.rows()
        for row, key in enumerate(call.keys()):
            if key not in self._file_of:
                raise TeacherError(
                    f"{self.folder} has no prediction for row {row} of a training batch ({ids.shape[1]} tokens, the "
                    f"first are {ids[row, :5].tolist()}); save_predictions must see the very rows that are trained on"
                )
            file = self._files[self._file_of[key]]
            indices.append(file.get_tensor(f"{key}.indices"))
            log_probabilities.append(file.get_tensor(f"{key}.log_probabilities"))
        return torch.cat(indices), torch.cat(log_probabilities)


@torch.no_grad()
def save_predictions(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], folder: str | Path, top: int = 64, progress: bool = True
) -> None:
    """Write a dense model's top k tokens at every position of all batches, for distillation without the model.

    Takes `top * 6` bytes for each token.

    Args:
        model: dense model that returns `logits` (B, T, V).
        batches: keyword arguments of the model. They must hold exactly the rows used in training; their order, batch
            size and padding may differ.
        folder: folder to write; the output of an earlier call is replaced.
        top: number of tokens saved at each position.
        progress: whether to draw a progress bar.

    Raises:
        TeacherError: there are no batches, they have no `input_ids`, or the model has an encoder.
        OutputError: the folder has other content, or cannot be written.
    """
    if has_encoder(model):
        raise TeacherError("predictions of a decoder depend on labels too, which rows are not found by; keep the model")
    device = next(model.parameters()).device
    file_of: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    vocabulary = 0
    with replacing_folder(folder) as temporary, evaluation_mode(model):

        def write() -> None:
            name = f"predictions-{len(set(file_of.values())):05d}.safetensors"
            file_of.update(dict.fromkeys({key.partition(".")[0] for key in pending}, name))
            save_file(pending, temporary / name)
            pending.clear()

        for batch in tqdm(batches, desc="predictions", unit="batch", disable=not progress):
            here: Any = move_data_to_device({k: v for k, v in batch.items() if k != "labels"}, device)
            logits = logits_of(model(**here))
            vocabulary = logits.shape[-1]
            found = logits.float().log_softmax(-1).topk(min(top, vocabulary))
            call = Call((), here, logits)
            for row, (key, counts) in enumerate(zip(call.keys(), call.rows()[1], strict=True)):
                pending[f"{key}.indices"] = found.indices[row][counts].int().cpu()
                pending[f"{key}.log_probabilities"] = found.values[row][counts].half().cpu()
            if len(pending) >= 2 * ROWS_A_FILE:
                write()
        if pending:
            write()
        if not file_of:
            raise TeacherError("there are no batches to save predictions of")
        told = {"top": top, "vocabulary": vocabulary, "rows": file_of}
        (temporary / INDEX).write_text(json.dumps(told), encoding="utf-8")


def has_encoder(model: nn.Module) -> bool:
    """Return True if a transformers model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
