"""Distillation: how far the predictions of the low-rank model are from those of the dense one it was.

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
from zssvd_lightning.errors import TeacherError
from zssvd_lightning.model.logits import logits_of
from zssvd_lightning.recovery.divergence import counted, divergence, divergence_from_top

INDEX = "predictions.json"


ROWS_A_FILE = 64


class Call(NamedTuple):
    """A forward pass of the low-rank model in training."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor
    """(B, T, V), with a graph behind them."""
    encodes: bool = False
    """Whether logits are a decoder's, and inputs and their mask an encoder's."""

    def mask(self, of_inputs: Tensor | None) -> Tensor | None:
        """Which positions (B, T) of the logits count, given those of the inputs."""
        labels = self.kwargs.get("labels")
        if self.encodes:
            return labels != IGNORED_LABEL if isinstance(labels, Tensor) else None
        return of_inputs

    def rows(self) -> tuple[Tensor, Tensor]:
        """Input ids (B, T) and which of them are no padding (B, T).

        Raises:
            TeacherError: there are none.
        """
        ids = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise TeacherError("saved predictions are found by input_ids (B, T), which the model was not called with")
        mask = token_mask(self.kwargs)
        return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

    def keys(self) -> list[str]:
        """What names each row: a digest of all it consists of but labels and padding."""
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
    """What is distilled from."""

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """Mean Kullback-Leibler divergence (nats), over positions that `mask` (B, T) leaves, from its predictions."""
        ...


class DenseTeacher:
    """A dense model in memory.

    Args:
        model: in evaluation mode, without gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dtype = next(model.parameters()).dtype

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """See `Teacher`."""
        unused = () if call.encodes else ("labels",)  # of which encoder-decoders make what the decoder reads
        kwargs = {key: self._cast(value) for key, value in call.kwargs.items() if key not in unused}
        device, low = call.logits.device.type, self._dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(device, self._dtype if low else torch.bfloat16, enabled=low):
            logits = logits_of(self.model(*map(self._cast, call.args), **kwargs))
        counting = call.mask(mask)
        return divergence(counted(call.logits, counting), counted(logits, counting), temperature)

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class SavedPredictions:
    """The likeliest tokens of the dense model and their probabilities, as `save_predictions` wrote them.

    Args:
        folder: that it wrote.

    Raises:
        TeacherError: there is no such folder, or it is damaged.
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
        """Raises TeacherError for a model of another vocabulary."""
        size = getattr(getattr(model, "config", None), "vocab_size", self._vocabulary)
        if size != self._vocabulary:
            raise TeacherError(
                f"{self.folder} has predictions over {self._vocabulary} tokens, but {type(model).__name__} has {size}; "
                "save those of the model that is compressed"
            )

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """See `Teacher`; the tokens that were not saved count as one."""
        there = call.rows()[1]
        indices, log_probabilities = (part.to(call.logits.device) for part in self._looked_up(call))
        counting = (there if mask is None else there & mask)[there]
        student = call.logits[there]
        if not counting.all():
            student, indices, log_probabilities = (p[counting] for p in (student, indices, log_probabilities))
        return divergence_from_top(student, indices.long(), log_probabilities, temperature)

    def _looked_up(self, call: Call) -> tuple[Tensor, Tensor]:
        """(N, k) each, of the N positions of all rows that are no padding."""
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
    """Writes a dense model's likeliest tokens at every position of all batches, to distill from without the model.

    Takes `top * 6` bytes a token.

    Args:
        model: returns `logits` (B, T, V).
        batches: as transformers takes them, the very rows that will be trained on, in any order, batch size and
            padding.
        folder: to write; what an earlier call left there is replaced.
        top: how many tokens are kept at a position.
        progress: whether to draw a progress bar.

    Raises:
        TeacherError: there are no batches, they have no `input_ids`, or the model has an encoder.
        OutputError: the folder holds something else, or cannot be written.
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
    """Whether a model of transformers has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
