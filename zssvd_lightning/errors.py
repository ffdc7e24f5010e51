"""Every way a run can be refused, by name. Each message says which module or key, what was found and what to do."""


class ZSSVDError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ZSSVDError, ValueError):
    """A setting is unknown, of the wrong type or outside its range."""


class TargetError(ZSSVDError, ValueError):
    """The layers asked for cannot be factorized, or there are none."""


class BudgetError(ZSSVDError, ValueError):
    """The prune ratio cannot be reached with the rank floor that was asked for."""


class TextError(ZSSVDError, ValueError):
    """A text source is unknown, unreadable, empty or too short."""


class ModelSourceError(ZSSVDError, ValueError):
    """A model source is unknown or does not hold what it should."""


class CalibrationError(ZSSVDError, RuntimeError):
    """The calibration batches do not give the statistics the method needs."""


class NonFiniteError(CalibrationError):
    """A loss, an activation or a gradient is NaN or infinite."""


class ZeroGradientError(CalibrationError):
    """The loss does not depend on a target layer, so its components cannot be scored."""


class NotPositiveDefiniteError(CalibrationError):
    """A second moment stays indefinite however much jitter is added."""


class UnsupportedTrainingError(ZSSVDError, RuntimeError):
    """The training run is of a kind the callback cannot compress in."""


class ProcessFailedError(ZSSVDError, RuntimeError):
    """Another process of the run failed; the message says which, and how."""


class UnfinishedError(ZSSVDError, RuntimeError):
    """Training ended before the model was factorized."""


class CheckpointError(ZSSVDError, RuntimeError):
    """A checkpoint does not fit the module or the callback that is to go on from it."""


class PlanError(ZSSVDError, ValueError):
    """A rank plan cannot be read, or does not fit the model."""


class OutputError(ZSSVDError, OSError):
    """An output folder cannot be written without losing something."""


class SavedModelError(ZSSVDError, RuntimeError):
    """A saved model does not hold what its config says."""


class RecoveryError(ZSSVDError, RuntimeError):
    """A low-rank model cannot be trained as its recovery says."""


class DivergedError(RecoveryError):
    """A loss or a gradient of the recovery is NaN or infinite; the model has the last weights that gave none."""


class LogitsError(ZSSVDError, RuntimeError):
    """It is not known which logits a loss is of, or there are none."""


class TeacherError(RecoveryError):
    """There is no model, or there are no predictions, to distill from."""


class RankDeficientWarning(UserWarning):
    """A second moment was singular; names the layer and the jitter that made it positive definite."""


class TaskError(ZSSVDError, ValueError):
    """A task to evaluate on is unknown, does not load, or its rows are missing or malformed."""


class UnsupportedServingError(ZSSVDError, RuntimeError):
    """A serving engine needs a layer in a way that its compressed form does not allow."""


class ExportError(ZSSVDError, RuntimeError):
    """A model cannot be written in the format asked for."""


class QuantizationError(ZSSVDError, ValueError):
    """A model cannot be kept in 8 bits as asked."""
