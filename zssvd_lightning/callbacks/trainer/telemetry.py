"""Metrics for loggers and other callbacks while a model is compressed inside a training run.

They are in `trainer.callback_metrics` from then on, so that `ModelCheckpoint` and `EarlyStopping` can monitor them.
Those of the second compression of a Trainer begin with `zssvd2/`, and so on.

| metric                                | logged            | meaning                                                  |
|---------------------------------------|-------------------|----------------------------------------------------------|
| zssvd/phase                           | every phase       | index of the phase, in the order of `Phase`              |
| zssvd/gathered, zssvd/to_gather       | as Lightning logs | batches of a calibration or correction: done and needed  |
| zssvd/first_order_sum                 | every truncation  | first-order sum over the dropped components (nats)       |
| zssvd/kept_parameters                 | every truncation  | parameters that remain in the target layers              |
| zssvd/pruned                          | every truncation  | removed fraction, in the unit of the budget              |
| zssvd/loss_before                     | every truncation  | mean loss of the calibration before it (nats)            |
| zssvd/loss_after                      | after truncation  | mean loss of the next batches at those weights (nats):   |
|                                       |                   | of a correction, or before the first recovery step       |
| zssvd/loss_kept_back_dense            | every truncation  | loss of the dense model on the batches kept back (nats)  |
| zssvd/loss_kept_back                  | every truncation  | smallest loss of a truncated state on them (nats)        |
| zssvd/step_fraction                   | every correction  | fraction of the projected step that was taken            |
| zssvd/prehab_weight                   | as Lightning logs | lambda of `LowRankPrehab`                                |
| zssvd/stable_rank, zssvd/nuclear_norm | as Lightning logs | mean over layers of the regularizer of `LowRankPrehab`   |
| zssvd/distillation                    | as Lightning logs | divergence from the dense model (nats)                   |
| zssvd/held_out_loss                   | `judge_every`     | loss of the recovery on the held-out batches (nats)      |
| zssvd/recovery_stage                  | every stage       | index of the recovery stage                              |
| zssvd/low_rank_layers                 | every truncation  | number of target layers that are low-rank                |
| zssvd/rank_lowest, zssvd/rank_median, | every truncation  | lowest, median and highest of their ranks                |
| zssvd/rank_highest                    |                   |                                                          |
| zssvd/ranks                           | every truncation  | histogram of their ranks, for loggers that take one      |
|                                       |                   | (TensorBoard)                                            |

With matplotlib, TensorBoard and Weights & Biases also get pictures of every truncation: `zssvd/rank_map`,
`zssvd/walk` and `zssvd/sensitivities`; see `callbacks/loggers`. `Report.layers` has the rank of every layer.
"""

from collections.abc import Sequence
from statistics import median

import lightning as L
import torch

from zssvd_lightning.callbacks.loggers.pictures import log_pictures
from zssvd_lightning.compression.course import Act, Stage
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report

PREFIX = "zssvd/"
"""Start of the names of the metrics of a first compression."""


def prefix_of(number: int) -> str:
    """Return the start of the names of the metrics of a Trainer's compression, which are counted from 1 on."""
    return PREFIX if number <= 1 else f"zssvd{number}/"


def log(trainer: L.Trainer, prefix: str, **metrics: float) -> None:
    """Send metrics to every logger at the current step, and show them to other callbacks."""
    named = {f"{prefix}{name}": float(value) for name, value in metrics.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
    for logger in trainer.loggers:
        logger.log_metrics(named, trainer.global_step)


def log_phase(trainer: L.Trainer, prefix: str, phase: Phase) -> None:
    """Log the index of a phase."""
    log(trainer, prefix, phase=list(Phase).index(phase))


def is_due(trainer: L.Trainer, count: int) -> bool:
    """Return True if Lightning logs at this count of steps or batches. With `log_every_n_steps=0` it never does."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and count % every == 0


def log_progress(trainer: L.Trainer, prefix: str, gathered: int, to_gather: int) -> None:
    """Log the number of gathered batches, as often as Lightning logs and after the last batch."""
    if is_due(trainer, gathered) or gathered == to_gather:
        log(trainer, prefix, gathered=gathered, to_gather=to_gather)


def log_stage(trainer: L.Trainer, prefix: str, stage: Stage, compression: Compression) -> None:
    """Log the results of a stage of the compression."""
    if stage.corrects:
        log(trainer, prefix, loss_after=compression.losses[-1])
    if Act.SHORTEN_STEP in stage.acts or (Act.CORRECT in stage.acts and not compression.config.line_search):
        log(trainer, prefix, step_fraction=compression.fractions[-1])
    if stage.truncates:
        _log_truncation(trainer, prefix, compression.report())


def _log_truncation(trainer: L.Trainer, prefix: str, report: Report) -> None:
    if report.kept_back is not None:
        kept_back = report.kept_back
        log(trainer, prefix, loss_kept_back_dense=kept_back["dense"], loss_kept_back=kept_back["final"])
    log(
        trainer,
        prefix,
        first_order_sum=report.first_order_sum,
        kept_parameters=report.parameters_after,
        pruned=report.reached,
        loss_before=report.losses[-1],
    )
    log_pictures(trainer, report, prefix)
    _log_ranks(trainer, prefix, [layer.rank for layer in report.layers.values() if layer.rank is not None])


def _log_ranks(trainer: L.Trainer, prefix: str, ranks: Sequence[int]) -> None:
    """Log the number of low-rank layers and a summary of their ranks, with a histogram where a logger takes one."""
    log(trainer, prefix, low_rank_layers=len(ranks))
    if not ranks:
        return
    log(trainer, prefix, rank_lowest=min(ranks), rank_median=median(ranks), rank_highest=max(ranks))
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if callable(add_histogram := getattr(getattr(logger, "experiment", None), "add_histogram", None)):
                add_histogram(f"{prefix}ranks", torch.tensor(ranks), trainer.global_step)
