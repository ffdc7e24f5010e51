"""Zero-shot accuracy by EleutherAI's lm-evaluation-harness, on its tasks, some with local rows, or on custom tasks."""

import copy
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._contexts import evaluation_mode, overridden, same_random_numbers
from zssvd_lightning._validation import closest, needs_extra
from zssvd_lightning.errors import NonFiniteError, TaskError
from zssvd_lightning.evaluation.rows import LOCAL, RowsFile, read_rows, rows_file

STDERR = "_stderr"


SEED = 1234
"""Default seed of the harness, so that few-shot examples match its command line."""


Tasks = dict[str, Any]
"""Tasks and groups of the harness, by name, under the keys `tasks` and `groups`."""


Scores = dict[str, dict[str, float]]
"""Scores by task: `rows`, and each metric with its standard error, such as `acc` and `acc_stderr`."""


Compared = Mapping[str, Mapping[str, Any]]
"""Result of `side_by_side`."""


class Metric(NamedTuple):
    """Metric of a task, of several models."""

    task: str
    name: str
    rows: int | None
    """Number of scored rows; None for a group of tasks."""
    values: Mapping[str, float]
    """Value by model."""
    errors: Mapping[str, float]
    """Standard error by model; empty for a single row."""

    @property
    def title(self) -> str:
        """Task, metric and number of rows."""
        return f"{self.task}, {self.name}" + ("" if self.rows is None else f", {self.rows} rows")

    def shown(self) -> dict[str, str]:
        """Return the value with its standard error, by model."""
        errors = {model: f" ± {error:.4f}" for model, error in self.errors.items()}
        return {model: f"{value:.4f}{errors.get(model, '')}" for model, value in self.values.items()}


def load_tasks(names: Collection[str], data: str | Path | None = None, include: str | Path | None = None) -> Tasks:
    """Load tasks with their rows, for `accuracy`.

    Args:
        names: names of tasks, groups or tags, from the harness or from `include`, or `.jsonl` files with rows like
            those of a task in `LOCAL`, which the field of the text tells. The task of a file has the name of the file
            without extension.
        data: folder with such files, and with the rows of the tasks in `LOCAL`. If given, these tasks read their rows
            from it, and the other tasks of the harness, whose rows are on the hub, are unavailable.
        include: folder with YAML files of more tasks.

    Raises:
        TaskError: lm-eval is not installed, a task is unknown (the message suggests the nearest name) or does not
            load, two have the same name, the folder `include` or a file of rows is missing, or a row is malformed (the
            message names the line).
        MissingExtraError: a file of rows needs the datasets library, which is not installed.
    """
    folder = None if include is None else Path(include).expanduser()
    if folder is not None and not folder.is_dir():
        raise TaskError(f"include folder {include} does not exist; name one with YAML files of tasks")
    files = {name: file for name in names if (file := rows_file(name, data)) is not None}
    titles = [files[name].title if name in files else name for name in names]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise TaskError(f"two tasks have the name {twice[0]!r}; leave one out, or give its file another name")
    task_manager, _, _ = _harness()
    specs = {name: _config(file) for name, file in files.items()}
    with _logging(logging.ERROR):
        manager = task_manager(include_path=folder, include_defaults=data is None and len(specs) < len(names))
        valid = [*(() if data is None else LOCAL), *manager.all_tasks]
        if unknown := [name for name in names if name not in specs and name not in valid]:
            raise TaskError(f"unknown task {unknown[0]!r}{closest(unknown[0], valid)}")
        loaded = [_load(manager, name, specs.get(name, name)) for name in names]
    return {kind: {k: v for part in loaded for k, v in part.get(kind, {}).items()} for kind in ("tasks", "groups")}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TaskError if a tokenizer has neither a beginning-of-text token nor an end-of-text token."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TaskError("the tokenizer has no bos_token and no eos_token; the harness needs one, for empty contexts")


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    batch_size: int = 8,
    limit: int | None = None,
) -> Scores:
    """Return the harness's scores of a causal language model, without a chat template.

    The model is evaluated on its current device and in its current type. Random numbers of the caller stay what they
    are.

    Args:
        model: dense or compressed model.
        tokenizer: tokenizer of the model.
        tasks: tasks from `load_tasks`.
        batch_size: number of sequences in a batch.
        limit: number of rows of each task, counted from the first; every row when None.

    Raises:
        TaskError: the tokenizer has neither a beginning-of-text token nor an end-of-text token, or a choice has no
            tokens, or more than the model takes.
        NonFiniteError: a log-likelihood is NaN.
    """
    check_tokenizer(tokenizer)
    _, wrapper, evaluate = _harness()
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    with same_random_numbers(SEED), evaluation_mode(model), redirect_stdout(sys.stderr):
        with _logging(logging.ERROR), overridden(model, tie_weights=lambda *_, **__: None):
            wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        with _logging(logging.WARNING):
            try:
                results = evaluate(wrapped, tasks, limit=limit)
            except AssertionError as error:  # which is how the harness refuses a row
                raise TaskError(
                    f"a choice of {', '.join(tasks['tasks'])} has no tokens, or more than the model takes; leave such "
                    "rows out"
                ) from error
    for name, samples in results["samples"].items():
        if any(_is_nan(response) for sample in samples for response in sample["filtered_resps"]):
            raise NonFiniteError(f"log-likelihoods are NaN on {name}; evaluate in float32 or bfloat16")
    return {
        name: {**_rows(results, name), **scores}
        for name, measured in results["results"].items()
        if (scores := dict(_scores(measured)))
    }


def side_by_side(scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Merge the scores of several models: return, by task, `rows` and each metric by model name."""
    first, *_ = scores.values()
    return {
        task: {
            metric: value if metric == "rows" else {model: own[task][metric] for model, own in scores.items()}
            for metric, value in measured.items()
        }
        for task, measured in first.items()
    }


def metrics_of(compared: Compared) -> list[Metric]:
    """Return every metric of the result of `side_by_side`, each with its standard errors."""
    return [
        Metric(task, name, found.get("rows"), values, found.get(name + STDERR, {}))
        for task, found in compared.items()
        for name, values in found.items()
        if isinstance(values, Mapping) and not name.endswith(STDERR)
    ]


def table(compared: Compared) -> Table:
    """Return the result of `side_by_side` as a table for a terminal."""
    metrics = metrics_of(compared)
    table = Table("task", "metric", title="zero-shot, with standard errors")
    for model in metrics[0].values:
        table.add_column(model, justify="right")
    for metric in metrics:
        table.add_row(Text(metric.task), metric.name, *metric.shown().values())
    return table


def _harness() -> tuple[Any, Any, Any]:
    """Return the harness's task manager class, its model wrapper class and its evaluation function."""
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"tasks need lm-eval ({error}); pip install 'zssvd-lightning[zero-shot]'") from error
    return TaskManager, HFLM, evaluate


def _load(manager: Any, name: str, spec: str | dict[str, Any]) -> Tasks:
    try:
        loaded: Tasks = manager.load([spec])
    except Exception as error:
        hint = f"; without network, give its rows as data=FOLDER with {LOCAL[name].file}" if name in LOCAL else ""
        raise TaskError(f"task {name!r} does not load: {type(error).__name__}: {error}{hint}") from error
    return loaded


def _config(file: RowsFile) -> dict[str, Any]:
    """Return the task of a file as a config of the harness; its rows are in memory, so that no cache can be stale."""
    with needs_extra("data", "tasks on local rows"):
        from datasets import Dataset
    task, read = read_rows(file)
    rows = Dataset.from_list(read)
    return {
        "task": file.title,
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: {"rows": rows},
        "validation_split": "rows",
        **task.prompts,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in task.metrics],
    }


def _rows(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """Return the number of scored rows of a task; empty for a group."""
    counted = results["n-samples"].get(task)
    return {} if counted is None else {"rows": counted["effective"]}


def _scores(measured: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each metric's name and value; the keys of the harness have the form `METRIC,FILTER`."""
    for key, value in measured.items():
        metric, _, filter_ = key.partition(",")
        if filter_ and not isinstance(value, str):
            yield metric if filter_ == "none" else key, float(value)


def _is_nan(response: Any) -> bool:
    value = response[0] if isinstance(response, tuple) else response
    return isinstance(value, float) and math.isnan(value)


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Set the log level of the harness within the context."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
