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
from torch.nn.functional import kl_div
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from zssvd_lightning.calibration import evaluation_mode, token_mask
from zssvd_lightning.errors import TeacherError
from zssvd_lightning.files import replacing_folder
from zssvd_lightning.statistics import accumulated

INDEX = "predictions.json"
ROWS_A_FILE = 64
ROWS = 256
"""Positions that are compared at a time."""


class Call(NamedTuple):
    """A forward pass of the low-rank model in training."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor
    """(B, T, V), with a graph behind them."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Input ids (B, T) and which of them are no padding (B, T)."""
        ids = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise TeacherError("saved predictions are found by input_ids (B, T), which the model was not called with")
        mask = token_mask(self.kwargs)
        return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask


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

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """See `Teacher`."""
        kwargs = {key: value for key, value in call.kwargs.items() if key != "labels"}
        with torch.no_grad():
            logits = logits_of(self.model(*call.args, **kwargs))
        return divergence(counted(call.logits, mask), counted(logits, mask), temperature)


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
            self.top: int = told["top"]
            names = sorted(set(self._file_of.values()))
            self._files: dict[str, Any] = {n: safe_open(self.folder / n, framework="pt") for n in names}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TeacherError(
                f"recovery.teacher {str(folder)!r} holds no predictions: {error!r}; write them with save_predictions, "
                "or set it to 'memory'"
            ) from error

    def divergence(self, call: Call, mask: Tensor | None, temperature: float) -> Tensor:
        """See `Teacher`; the tokens that were not saved count as one."""
        indices, log_probabilities = (part.to(call.logits.device) for part in self._looked_up(call))
        return divergence_from_top(
            counted(call.logits, mask), counted(indices, mask).long(), counted(log_probabilities, mask), temperature
        )

    def _looked_up(self, call: Call) -> tuple[Tensor, Tensor]:
        indices, log_probabilities = [], []
        ids, mask = call.rows()
        for row, key in enumerate(_keys(ids, mask)):
            if key not in self._file_of:
                raise TeacherError(
                    f"{self.folder} has no prediction for row {row} of a training batch ({ids.shape[1]} tokens, the "
                    f"first are {ids[row, :5].tolist()}); save_predictions must see the very rows that are trained on"
                )
            file = self._files[self._file_of[key]]
            indices.append(file.get_tensor(f"{key}.indices"))
            log_probabilities.append(file.get_tensor(f"{key}.log_probabilities"))
        return torch.stack(indices), torch.stack(log_probabilities)


@torch.no_grad()
def save_predictions(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], folder: str | Path, top: int = 64, progress: bool = True
) -> None:
    """Writes a dense model's likeliest tokens at every position of all batches, to distil from without the model.

    Takes `top * 6` bytes a token.

    Args:
        model: returns `logits` (B, T, V).
        batches: as transformers takes them, the very rows that will be trained on, in any order and batch size.
        folder: to write; what an earlier call left there is replaced.
        top: how many tokens are kept at a position.
        progress: whether to draw a progress bar.

    Raises:
        TeacherError: there are no batches, or they have no `input_ids`.
        OutputError: the folder holds something else, or cannot be written.
    """
    device = next(model.parameters()).device
    file_of: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    with replacing_folder(folder) as temporary, evaluation_mode(model):

        def write() -> None:
            name = f"predictions-{len(set(file_of.values())):05d}.safetensors"
            file_of.update(dict.fromkeys({key.partition(".")[0] for key in pending}, name))
            save_file(pending, temporary / name)
            pending.clear()

        for batch in tqdm(batches, desc="predictions", unit="batch", disable=not progress):
            here: Any = move_data_to_device({k: v for k, v in batch.items() if k != "labels"}, device)
            logits = logits_of(model(**here))
            found = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]))
            for row, key in enumerate(_keys(*Call((), here, logits).rows())):
                pending[f"{key}.indices"] = found.indices[row].int().cpu()
                pending[f"{key}.log_probabilities"] = found.values[row].half().cpu()
            if len(pending) >= 2 * ROWS_A_FILE:
                write()
        if pending:
            write()
        if not file_of:
            raise TeacherError("there are no batches to save predictions of")
        told = {"top": top, "rows": file_of}
        (temporary / INDEX).write_text(json.dumps(told), encoding="utf-8")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over rows of logits (N, V), in nats.

    Hinton, Vinyals and Dean, arXiv 1503.02531. It is computed in float32 or wider, some rows at a time.
    """
    found: Tensor = _Divergence.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


def divergence_from_top(student: Tensor, indices: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """The same, of distributions in which all tokens but some are one; a temperature is applied to those.

    Args:
        student: logits (N, V).
        indices: (N, k), the tokens kept.
        log_probabilities: (N, k), the teacher's at temperature 1.
        temperature: see `divergence`.
    """
    log_q = student.float().log_softmax(-1)
    kept_p = log_probabilities.float()
    kept_q = log_q.gather(-1, indices)
    p, q = (_with_rest(kept) / temperature for kept in (kept_p, kept_q))
    return temperature**2 * kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, ...) of values (B, T, ...) where `mask` (B, T) is true; all without a mask of that shape."""
    if mask is not None and mask.shape == values.shape[:2]:
        return values[mask]
    return values.flatten(0, -2)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model of transformers returns. Raises TeacherError where there are none."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        raise TeacherError(f"distillation compares logits, but the model returns {type(output).__name__} without any")
    return logits


def model_with_logits(module: nn.Module) -> nn.Module:
    """The model of transformers that a module holds.

    Raises:
        TeacherError: there is none, or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(name.startswith(outer) for outer, _ in found):
            found.append((f"{name}." if name else "", part))
    if len(found) != 1:
        raise TeacherError(
            f"distillation needs to know which model's logits to compare, and {type(module).__name__} holds "
            f"{len(found)} of transformers; override ZSSVDCallback.student to name one that returns logits"
        )
    return found[0][1]


class _Divergence(torch.autograd.Function):
    """`divergence` and its gradient `T (softmax(student / T) - softmax(teacher / T)) / N` in one go.

    Autograd would keep several matrices (N, V) of float32; this keeps one, in the type of the student's logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        wide = accumulated(student.dtype)
        total, gradient = student.new_zeros((), dtype=wide), torch.empty_like(student)
        for s, t, g in zip(*(torch.split(rows, ROWS) for rows in (student, teacher, gradient)), strict=True):
            log_q, log_p = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (s, t))
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            g.copy_(log_q.exp_().sub_(p).mul_(temperature / len(student)))
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / len(student))

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * from_above[0].to(gradient.dtype), None, None


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Log-probabilities (N, k + 1), the last of everything else."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_probabilities, rest.log()], -1)


def _keys(ids: Tensor, mask: Tensor) -> list[str]:
    """What names each row: a digest of its tokens and of what is padding."""
    rows = zip(ids.cpu().long().numpy(), mask.cpu().bool().numpy(), strict=True)
    return [sha256(tokens.tobytes() + kept.tobytes()).hexdigest()[:32] for tokens, kept in rows]
