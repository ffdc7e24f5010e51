"""Errors and warnings of this package. Each message names the module or key, the actual value and the remedy."""

MOST_SHOWN = 80
"""Maximum number of characters of a value in a message."""


def shown(value: object) -> str:
    """Return a value as messages show it: its beginning, if it is long."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  values are of any type, and a number may have too many digits
        return "a value that cannot be shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class ZSSVDError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(ZSSVDError, ValueError):
    """Setting that is unknown, of the wrong type or out of range."""


class ContradictionError(ConfigError):
    """Settings that are valid alone but exclude each other."""


class TargetError(ZSSVDError, ValueError):
    """Requested layers that cannot be factorized or do not exist."""


class BudgetError(ZSSVDError, ValueError):
    """Prune ratio or ranks that conflict with the rank floor or the storage."""


class TextError(ZSSVDError, ValueError):
    """Text source that is unknown, unreadable, empty or too short."""


class ModelSourceError(ZSSVDError, ValueError):
    """Model source that is unknown or lacks the expected content."""


class CalibrationError(ZSSVDError, RuntimeError):
    """Calibration batches that do not provide the statistics the method needs."""


class NonFiniteError(CalibrationError):
    """Loss, activation or gradient that is NaN or infinite."""


class ZeroGradientError(CalibrationError):
    """Target layer on which the loss does not depend, so that its components cannot be scored."""


class NotPositiveDefiniteError(CalibrationError):
    """Second moment that is not positive definite even with the largest jitter."""


class PivotError(ZSSVDError, RuntimeError):
    """Matrices for which no common order of rows begins with pivots of each."""


class UnsupportedTrainingError(ZSSVDError, RuntimeError):
    """Training run of a kind in which the callback cannot compress."""


class ProcessFailedError(ZSSVDError, RuntimeError):
    """Failure of another process of the run. The message says which process and why."""


class UnfinishedError(ZSSVDError, RuntimeError):
    """Training that ended before the model was factorized."""


class CheckpointError(ZSSVDError, RuntimeError):
    """Checkpoint that does not match the module or the callback that resumes from it."""


class PlanError(ZSSVDError, ValueError):
    """Rank plan that cannot be read or does not match the model."""


class MemoryLimitError(ZSSVDError, ValueError):
    """Compression that needs more memory than `max_memory` and `max_host_memory` allow."""


class OutputError(ZSSVDError, OSError):
    """Output that cannot be written, or not without overwriting other files."""


class SavedModelError(ZSSVDError, RuntimeError):
    """Saved model whose content does not match its config."""


class RecoveryError(ZSSVDError, RuntimeError):
    """Low-rank model that cannot be trained as the recovery settings require."""


class DivergedError(RecoveryError):
    """Loss that is not finite, or of a model that a compression destroyed. The model has its last good weights.

    In the recovery, these are the last ones for which loss and gradients were finite; otherwise those of before the
    compression.
    """


class LogitsError(ZSSVDError, RuntimeError):
    """Logits of the loss that are missing or ambiguous."""


class TeacherError(RecoveryError):
    """Missing model or predictions to distill from."""


class RankDeficientWarning(UserWarning):
    """Warning about a singular second moment. Names the layer and the jitter that made it positive definite."""


class LeftDenseWarning(UserWarning):
    """Warning about target layers that stay dense because calibration has not reached them, with the reasons."""


class NotRegularizedWarning(UserWarning):
    """Warning about layers that `LowRankPrehab` leaves out because its first batches have not reached them."""


class TaskError(ZSSVDError, ValueError):
    """Evaluation task that is unknown, does not load, or has missing or malformed rows."""


class UnsupportedServingError(ZSSVDError, RuntimeError):
    """Serving engine that uses a layer in a way its compressed form does not support."""


class UnsupportedCacheError(ZSSVDError, ValueError):
    """Model whose key-value cache cannot be kept in low-rank bases, or bases of another model."""


class ExportError(ZSSVDError, RuntimeError):
    """Model that cannot be written in the requested format."""


class QuantizationError(ZSSVDError, ValueError):
    """Model that cannot be stored in 8 bits as requested."""


class MissingExtraError(ZSSVDError, ImportError):
    """Missing package that only part of the library needs. The message names the extra to install."""
