"""Report of a compression, as a table and as JSON."""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from zssvd_lightning._files import json_of
from zssvd_lightning._state_checks import FaultError
from zssvd_lightning.compression.report_table import PERPLEXITIES, WIDEST, table_of
from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.model.coverage import Coverage
from zssvd_lightning.serialization.report_content import REPORT as CONTENT
from zssvd_lightning.serialization.report_content import with_nan

if TYPE_CHECKING:
    from zssvd_lightning.compression.engine import Compression

REPORT = "report.json"


NUMBERS = re.compile(r'\[\n[^][{}"]*\]')
"""List without strings and other lists in indented JSON."""

OPTIONAL = (
    *("kept_back", "held_out", *PERPLEXITIES, "word_perplexity", "accuracy"),
    *("file_bytes", "left_dense", "removed_experts", "freed_beside", "trace", "continuations", "tokens_per_second"),
)
"""Fields of a report whose keys `report.json` has only if there is something in them."""


VERSIONS = ("zssvd-lightning", "torch", "lightning", "transformers")


class LayerReport(NamedTuple):
    """Report on one target layer after compression."""

    rank: int | None
    """Number of remaining components; None if the layer stays dense. A layer that stays low-rank has its rank. 0 if it
    is removed with its expert."""
    shape: tuple[int, int]
    """Shape (m, n) of the dense weight."""
    kept: int
    """Parameters of the layer after compression, as it is stored; two in 8 bits count as one."""
    in_8_bits: bool = False
    """True if all or most of these parameters are in 8 bits."""
    highest: int | None = None
    """Largest allowed rank at which the layer would be smaller than it was: the break-even rank in the unit of the
    budget, rounded down to a multiple. None in reports of earlier releases."""
    flops: int | None = None
    """Floating-point operations of the layer per token after compression; None in reports of earlier releases."""
    units: tuple[int, int] | None = None
    """Hidden units after and before at the width that the layer writes or reads, if some were removed there."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, without what is not known."""
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in self._asdict().items()}
        return {k: v for k, v in told.items() if v is not None or k == "rank"}


@dataclass
class Report:
    """Settings, results and costs of a compression.

    Unless stated otherwise, parameters are those of the target layers. Two parameters in 8 bits count as one.
    """

    asked: float
    """Requested prune ratio."""
    parameters_before: int
    """Parameters just before this compression, where layers may be low-rank from an earlier one."""
    parameters_after: int
    model_parameters_before: int
    """Parameters of the whole model just before this compression, including all layers that are no targets."""
    layers: Mapping[str, LayerReport]
    first_order_sum: float
    """First-order sum over the dropped components of the last truncation (nats). It is no estimate of the change of
    the loss, which `kept_back` measures."""
    losses: list[float]
    """Mean loss (nats) of each gathering in order: for calibration, for a correction, and after its full step."""
    correction_fractions: list[float]
    """Fraction of each projected step that was taken."""
    seconds: dict[str, float]
    """Wall-clock seconds by step."""
    coverage: Coverage | None = None
    """Share of the model in the target layers, and what was left alone. None in reports of earlier releases."""
    kept_back: dict[str, float] | None = None
    """Loss (nats) on the calibration batches kept back: `dense`, `truncated` (after the first truncation to the prune
    ratio) and `final`, with the number of `batches` per process and of steps that were `taken_back`."""
    held_out: dict[str, float] | None = None
    """Losses (nats) on the held-out batches that judge a recovery: `truncated` before training and `recovered` after,
    with the number of `batches`, the `step` of training that the final state is of (0 if training did not improve the
    model), and the `steps` of the whole training."""
    perplexity: dict[str, float] | None = None
    """Perplexity of the `dense` and the `compressed` model, and of the `reloaded` one if it is saved in fewer bits.
    For a run with recovery: `dense`, `dense_finetuned`, `truncated` and `recovered`."""
    perplexity_second: dict[str, float] | None = None
    """Perplexity on a text from another domain, with the same keys."""
    perplexity_third: dict[str, float] | None = None
    """Perplexity on a text from a third domain, with the same keys."""
    word_perplexity: dict[str, dict[str, float]] | None = None
    """Word perplexity by text, with the same keys."""
    accuracy: Mapping[str, Mapping[str, Any]] | None = None
    """By task, the number of `rows`, and each metric (`acc`, `acc_norm`) and its standard error (`acc_stderr`) with the
    same keys: a `zero_shot.side_by_side`."""
    file_bytes: dict[str, int] | None = None
    """Bytes of the weights on disk: of the `compressed` model, `expected` for the numbers it stores, and of the
    `dense` model in the same type."""
    budget_in: str = "parameters"
    """Unit of the prune ratio: `parameters`, `bytes` or `flops`."""
    budget_of: str = "targets"
    """Reference of the prune ratio: the `targets` or the whole `model`."""
    reached: float = math.nan
    """Removed fraction of that. If not given, the removed fraction of the parameters of the target layers."""
    ratio_of: str = "dense"
    """Reference of `asked` and `reached`: the `dense` targets, or the `present` ones as they were just before."""
    parameters_dense: int = 0
    """Parameters of the targets if they were dense. If not given, those before."""
    rank_multiple: int = 1
    """Requested multiple of the ranks. Small layers may have a finer one, and a plan any ranks."""
    peak_rss_bytes: int = 0
    """Peak resident memory of the process so far (bytes)."""
    left_dense: Mapping[str, str] = field(default_factory=dict)
    """Layer -> reason, for target layers that calibration has not reached. They stay dense, and count neither in
    `layers` nor in the parameters of the target layers."""
    removed_experts: Sequence[str] = ()
    """Names of the experts that were removed."""
    freed_beside: int = 0
    """Parameters that went beside the weights, with experts and hidden units: biases."""
    trace: Mapping[str, Any] | None = None
    """Spectra, sensitivities, selection and states: a `Trace.to_dict`. None in reports of earlier releases."""
    continuations: Mapping[str, str] | None = None
    """Continuations of a `prompt` by the `dense` and the `compressed` model, and `how` their tokens were chosen."""
    tokens_per_second: Mapping[str, float] | None = None
    """Speeds that `zssvd bench --record` measured: `prefill` and `decode`, `dense_prefill` and `dense_decode`, at a
    `batch` and `context`."""
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters_dense = self.parameters_dense or self.parameters_before
        if math.isnan(self.reached):
            self.reached = self.removed

    @classmethod
    def of(cls, run: "Compression") -> "Report":
        """Return the report of a compression after a truncation."""
        selection = run.selection
        if selection is None:
            raise RuntimeError("there is nothing to report before a truncation")
        config, plan, flops = run.config, run.followed_plan, run.budget.counted_in("flops")
        ranks, narrower = {name: selection.rank(name) for name in run.targets}, selection.narrower(run.budget.shapes)
        counted = run.budget.counted_in("parameters")
        of_model = config.prune_ratio / run.budget.prune_ratio if config.budget_of == "model" else 1.0
        layers = {
            name: LayerReport(
                counted.present[name].rank if counted.stays_low_rank(name, rank) else rank,
                run.budget.shapes[name],
                counted.kept_of(name, rank, eight_bit=name in selection.eight_bit, narrower=narrower),
                rank != 0
                and not counted.stays_low_rank(name, rank)
                and (name in selection.eight_bit or config.form.rounds_at(rank)),
                run.budget.highest_rank(name, eight_bit=name in selection.eight_bit),
                flops.kept_of(name, rank, eight_bit=name in selection.eight_bit, narrower=narrower),
                selection.units_of(name, run.budget.shapes),
            )
            for name, rank in ranks.items()
        }
        return cls(
            asked=config.prune_ratio if plan is None else run.budget.reached(plan.ranks, plan.eight_bit) * of_model,
            parameters_before=counted.before,
            parameters_dense=sum(map(counted.dense, counted.shapes)),
            ratio_of=run.budget.ratio_of,
            parameters_after=counted.kept(ranks, selection.eight_bit, narrower),
            budget_in=run.budget.unit,
            rank_multiple=config.rank_multiple,
            budget_of=config.budget_of,
            reached=run.budget.reached(ranks, selection.eight_bit, narrower) * of_model,
            model_parameters_before=run.coverage.model_parameters,
            coverage=run.coverage,
            layers=layers,
            first_order_sum=selection.first_order_sum,
            losses=list(run.losses),
            correction_fractions=list(run.fractions),
            seconds=dict(run.stopwatch.seconds),
            kept_back=None if run.safeguard is None else run.safeguard.report(),
            left_dense=dict(run.left_dense),
            removed_experts=list(dict.fromkeys(name.rpartition(".")[0] for name in selection.removed)),
            freed_beside=sum(
                run.budget.shapes[name][0] - narrower.get(name, (0, 0))[0]
                for name in (*selection.removed, *narrower)
                if run.targets[name].module.bias is not None
            ),
            trace=run.trace.to_dict(),
        )

    @property
    def removed(self) -> float:
        """Removed fraction of `parameters_counted`."""
        return (self.parameters_counted - self.parameters_after) / self.parameters_counted

    @property
    def compresses_again(self) -> bool:
        """True if targets were low-rank before, from an earlier compression."""
        return self.parameters_before != self.parameters_dense

    @property
    def parameters_counted(self) -> int:
        """Parameters of the targets that the prune ratio counts from, as `ratio_of` says."""
        return self.parameters_dense if self.ratio_of == "dense" else self.parameters_before

    @property
    def model_parameters_after(self) -> int:
        """Parameters of the whole model after compression."""
        return self.model_parameters_before - self.parameters_before + self.parameters_after - self.freed_beside

    @property
    def perplexities(self) -> tuple[float, float] | None:
        """Perplexities of the dense and of the final model; None if not measured."""
        found = self.perplexity
        return (found["dense"], found.get("recovered", found.get("compressed", math.nan))) if found else None

    def within(self, prefix: str) -> "Report":
        """Return a copy with layer names relative to the submodule `prefix`. Raises KeyError if a layer is outside."""
        start = f"{prefix}."
        if outside := [name for name in self.layers if not name.startswith(start)]:
            raise KeyError(f"{outside[0]} is not within {prefix}")
        return replace(
            self,
            layers={name.removeprefix(start): layer for name, layer in self.layers.items()},
            left_dense={n.removeprefix(start): why for n, why in self.left_dense.items() if n.startswith(start)},
            removed_experts=[name.removeprefix(start) for name in self.removed_experts],
            trace=self.trace
            and {
                **self.trace,
                "spectra": {name.removeprefix(start): sigma for name, sigma in self.trace["spectra"].items()},
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types under the keys of `report.json`."""
        optional = {key: getattr(self, key) or None for key in OPTIONAL}
        optional["coverage"] = None if self.coverage is None else self.coverage.to_dict()
        return {
            "prune_ratio": {
                "asked": self.asked,
                "reached": self.reached,
                "of": self.budget_in,
                "counted_over": self.budget_of,
                "ratio_of": self.ratio_of,
            },
            "rank_multiple": self.rank_multiple,
            "parameters": {
                "dense": self.parameters_dense,
                "before": self.parameters_before,
                "after": self.parameters_after,
                "model": {"before": self.model_parameters_before, "after": self.model_parameters_after},
            },
            "first_order_sum": self.first_order_sum,
            "losses": self.losses,
            "correction_fractions": self.correction_fractions,
            **{key: value for key, value in optional.items() if value is not None},
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seed": self.seed,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
            "config": dict(self.config),
            "ranks": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Report":
        """Return the report that `to_dict` wrote. Raises KeyError if an entry is missing."""
        return cls(
            asked=saved["prune_ratio"]["asked"],
            parameters_before=saved["parameters"]["before"],
            parameters_after=saved["parameters"]["after"],
            model_parameters_before=saved["parameters"]["model"]["before"],
            layers={
                name: LayerReport(
                    **{k: layer[k] for k in LayerReport._fields if k in layer}
                    | {"shape": (*layer["shape"],), "units": layer.get("units") and (*layer["units"],)}
                )
                for name, layer in saved["ranks"].items()
            },
            first_order_sum=saved["first_order_sum"] if "first_order_sum" in saved else saved["predicted_drift"],
            losses=list(saved["losses"]),
            correction_fractions=list(saved["correction_fractions"]),
            seconds=dict(saved["seconds"]),
            coverage=None if saved.get("coverage") is None else Coverage.from_dict(saved["coverage"]),
            **{key: saved[key] for key in OPTIONAL if key in saved},
            budget_in=saved["prune_ratio"].get("of", "parameters"),
            budget_of=saved["prune_ratio"].get("counted_over", "targets"),
            reached=saved["prune_ratio"]["reached"],
            ratio_of=saved["prune_ratio"].get("ratio_of", "dense"),
            parameters_dense=saved["parameters"].get("dense", 0),
            rank_multiple=saved.get("rank_multiple", 1),
            peak_rss_bytes=saved["peak_rss_bytes"],
            seed=saved["seed"],
            config=saved["config"],
        )

    def __str__(self) -> str:
        """Return the table without details, as text as wide as its entries."""
        console, table = Console(file=StringIO(), width=WIDEST, color_system=None), self.table(details=False)
        console.width = console.measure(table).maximum
        with console.capture() as text:
            console.print(table)
        return text.get()

    def table(self, *, details: bool = True) -> Table:
        """Return a table for the terminal that compares the model before and after compression.

        Args:
            details: whether to add the seconds of each step and the first-order sum.
        """
        return table_of(self, details)


def write_report(folder: Path, report: Report) -> None:
    """Write `report.json` into a folder, with every list of numbers in a line.

    Numbers that are not finite become null, with a warning.
    """
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json_of(report.to_dict(), indent=2))
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> Report | None:
    """Return the report in a folder, or None if there is none. Raises SavedModelError if it is unreadable."""
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        saved = with_nan(json.loads(path.read_text(encoding="utf-8")))
        CONTENT(saved, "")
        return Report.from_dict(saved)
    except (OSError, ValueError, RecursionError, FaultError) as error:
        raise SavedModelError(f"{path} is no report of a compression: {error}; move it away") from error
