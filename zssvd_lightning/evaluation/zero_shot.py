"""Zero-shot accuracy by EleutherAI's lm-evaluation-harness, on its tasks, some with local rows, or on custom tasks."""

import copy
import json
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._validation import closest, needs_extra
from zssvd_lightning.errors import NonFiniteError, TaskError

BLANK = "_"
"""Placeholder for the option in a WinoGrande sentence."""


STDERR = "_stderr"


SEED = 1234
"""Default seed of the harness, so that few-shot examples match its command line."""


Tasks = dict[str, Any]
"""Tasks and groups of the harness, by name, under the keys `tasks` and `groups`."""


Scores = dict[str, dict[str, float]]
"""Scores by task: `rows`, and each metric with its standard error, such as `acc` and `acc_stderr`."""


class LocalTask(NamedTuple):
    """Task with the exact prompts of the harness, on rows `{FIELD, choices, gold}` of a JSON lines file."""

    file: str
    field: str
    """Name of the field with the text."""
    prompts: Mapping[str, Any]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


def with_options(row: Mapping[str, Any]) -> list[str]:
    """Return the contexts that are compared: a WinoGrande sentence up to its blank, followed by each option."""
    before, _, _ = row["sentence"].partition(BLANK)
    return [before + option for option in row["choices"]]


def behind_blank(row: Mapping[str, Any]) -> str:
    """Return the text that is scored: the rest of a WinoGrande sentence, which is the same after every option."""
    return str(row["sentence"].partition(BLANK)[2].strip())


ANSWERS = {"doc_to_choice": "choices", "doc_to_target": "gold"}


LOCAL = {
    "piqa": LocalTask("piqa_val.jsonl", "goal", {"doc_to_text": "Question: {{goal}}\nAnswer:", **ANSWERS}),
    "arc_easy": LocalTask(
        "arc_easy_test.jsonl", "question", {"doc_to_text": "Question: {{question}}\nAnswer:", **ANSWERS}
    ),
    "winogrande": LocalTask(
        "winogrande_val.jsonl",
        "sentence",
        {"doc_to_text": "gold", "doc_to_choice": with_options, "doc_to_target": behind_blank},
        ("acc",),
    ),
}
"""Tasks that can read local rows, by name.

WinoGrande has no `acc_norm`, because the scored text is the same for every option.
"""


def load_tasks(names: Collection[str], data: str | Path | None = None, include: str | Path | None = None) -> Tasks:
    """Load tasks with their rows, for `accuracy`.

    Args:
        names: names of tasks, groups or tags, from the harness or from `include`.
        data: folder with the rows of the tasks in `LOCAL`. If given, these tasks read their rows from it, and the
            other tasks of the harness, whose rows are on the hub, are unavailable.
        include: folder with YAML files of more tasks.

    Raises:
        TaskError: lm-eval is not installed, a task is unknown (the message suggests the nearest name) or does not
            load, the folder `include` or a file of rows is missing, or a row is malformed.
        MissingExtraError: `data` needs the datasets library, which is not installed.
    """
    folder = None if include is None else Path(include).expanduser()
    if folder is not None and not folder.is_dir():
        raise TaskError(f"include folder {include} does not exist; name one with YAML files of tasks")
    task_manager, _, _ = _harness()
    with _logging(logging.ERROR):
        manager = task_manager(include_path=folder, include_defaults=data is None)
        valid = [*(() if data is None else LOCAL), *manager.all_tasks]
        if unknown := [name for name in names if name not in valid]:
            raise TaskError(f"unknown task {unknown[0]!r}{closest(unknown[0], valid)}")
        loaded = [_load(manager, name, data) for name in names]
    return {kind: {k: v for part in loaded for k, v in part.get(kind, {}).items()} for kind in ("tasks", "groups")}


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    batch_size: int = 8,
    limit: int | None = None,
) -> Scores:
    """Return the harness's scores of a causal language model, without a chat template.

    The model is evaluated on its current device and in its current type.

    Args:
        model: dense or compressed model.
        tokenizer: tokenizer of the model.
        tasks: tasks from `load_tasks`.
        batch_size: number of sequences in a batch.
        limit: number of rows of each task, counted from the first; every row when None.

    Raises:
        TaskError: the tokenizer has neither a beginning-of-text token nor an end-of-text token.
        NonFiniteError: a log-likelihood is NaN.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TaskError("the tokenizer has no bos_token and no eos_token; the harness needs one, for empty contexts")
    _, wrapper, evaluate = _harness()
    set_seed(SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    with evaluation_mode(model), redirect_stdout(sys.stderr):
        with _logging(logging.ERROR):
            wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        with _logging(logging.WARNING):
            results = evaluate(wrapped, tasks, limit=limit)
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


def table(compared: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the result of `side_by_side` as a table for a terminal."""
    metrics = [(task, m, v) for task, values in compared.items() for m, v in values.items() if isinstance(v, dict)]
    table = Table("task", "metric", title="zero-shot, with standard errors")
    for model in metrics[0][2]:
        table.add_column(model, justify="right")
    for task, metric, values in metrics:
        if not metric.endswith(STDERR):
            errors = compared[task].get(metric + STDERR, {})
            table.add_row(
                task, metric, *(f"{v:.4f}" + (f" ± {errors[m]:.4f}" if m in errors else "") for m, v in values.items())
            )
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


def _load(manager: Any, name: str, data: str | Path | None) -> Tasks:
    spec = name if data is None or name not in LOCAL else _config(name, Path(data).expanduser())
    try:
        loaded: Tasks = manager.load([spec])
    except Exception as error:
        hint = f"; without network, give its rows as data=FOLDER with {LOCAL[name].file}" if name in LOCAL else ""
        raise TaskError(f"task {name!r} does not load: {type(error).__name__}: {error}{hint}") from error
    return loaded


def _config(name: str, folder: Path) -> dict[str, Any]:
    """Return a task of `LOCAL` as a config of the harness; its rows are in memory, so that no cache can be stale."""
    task = LOCAL[name]
    with needs_extra("data", "tasks on local rows"):
        from datasets import Dataset
    rows = Dataset.from_list(_read(folder / task.file, task))
    return {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: {"rows": rows},
        "validation_split": "rows",
        **task.prompts,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in task.metrics],
    }


def _read(path: Path, task: LocalTask) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise TaskError(f"cannot read the rows {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{path}, line {number} is not JSON: {error}") from error
        if problem := _problem(row, task):
            raise TaskError(f"{path}, line {number}: {problem}; rows are {{{task.field}, choices, gold}}")
        rows.append({task.field: row[task.field], "choices": row["choices"], "gold": row["gold"]})
    if not rows:
        raise TaskError(f"{path} holds no rows")
    return rows


def _problem(row: Any, task: LocalTask) -> str:
    """Return a description of the error in a row; empty if there is none."""
    if not isinstance(row, dict) or not isinstance(text := row.get(task.field), str):
        return f"no text {task.field!r}"
    if task.field == "sentence" and BLANK not in text:
        return f"no blank {BLANK!r} in the sentence"
    choices, gold = row.get("choices"), row.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return f"choices {choices!r} are not two texts or more"
    if type(gold) is not int or gold not in range(len(choices)):
        return f"gold {gold!r} is not the index of a choice"
    return ""


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
