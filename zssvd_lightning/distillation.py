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
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from zssvd_lightning.calibration import IGNORED_LABEL, evaluation_mode, token_mask
from zssvd_lightning.errors import TeacherError
from zssvd_lightning.files import replacing_folder
from zssvd_lightning.logits import logits_of
from zssvd_lightning.statistics import accumulated

INDEX = "predictions.json"
ROWS_A_FILE = 64
POSITIONS = 256
"""Positions that are compared at a time."""


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
    """Writes a dense model's likeliest tokens at every position of all batches, to distil from without the model.

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


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over rows of logits (N, V), in nats.

    Hinton, Vinyals and Dean, arXiv 1503.02531. It is computed in float32 or wider, some rows at a time.
    """
    refuse_nothing(student)
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
    refuse_nothing(student)

    def some(s: Tensor, i: Tensor, kept_p: Tensor) -> Tensor:
        kept_q = s.float().gather(-1, i) - s.float().logsumexp(-1, keepdim=True)
        p, q = (_with_rest(kept) / temperature for kept in (kept_p.float(), kept_q))
        return kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)

    parts = zip(*(torch.split(rows, POSITIONS) for rows in (student, indices, log_probabilities)), strict=True)
    sums = [checkpoint(some, *part, use_reentrant=False) for part in parts]
    return temperature**2 * torch.stack(sums).sum() / len(student)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, ...) of values (B, T, ...) where `mask` (B, T) is true; all without a mask of that shape."""
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2] and not mask.all():
        return values[mask]
    return values.flatten(0, -2)


def refuse_nothing(student: Tensor) -> None:
    """Raises TeacherError for logits (N, V) at no position."""
    if not len(student):
        raise TeacherError("a training batch is all padding, so there are no predictions to compare; drop such batches")


def has_encoder(model: nn.Module) -> bool:
    """Whether a model of transformers has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class _Divergence(torch.autograd.Function):
    """`divergence` and its gradient `T (softmax(student / T) - softmax(teacher / T)) / N` in one go.

    Autograd would keep several matrices (N, V) of float32. This keeps the difference of probabilities, in the type of
    the student's logits unless that is float16, in which small ones vanish before a loss scale can save them.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        wide = accumulated(student.dtype)
        total = student.new_zeros((), dtype=wide)
        difference = torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else None)
        for s, t, d in zip(*(torch.split(rows, POSITIONS) for rows in (student, teacher, difference)), strict=True):
            log_q, log_p = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (s, t))
            p = log_p.exp()
            total += torch.where(p > 0, p * log_p.sub_(log_q), 0.0).sum()
            d.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(difference)
        ctx.dtype, ctx.factor = student.dtype, temperature / len(student)
        return total * (temperature**2 / len(student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> Any:
        (difference,) = ctx.saved_tensors
        gradient = torch.empty_like(difference, dtype=ctx.dtype)
        for d, g in zip(torch.split(difference, POSITIONS), torch.split(gradient, POSITIONS), strict=True):
            g.copy_(d * (from_above * ctx.factor))
        return gradient, None, None


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Log-probabilities (N, k + 1), the last of everything else."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_probabilities, rest.log()], -1)
