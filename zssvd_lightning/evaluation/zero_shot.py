"""Zero-shot accuracy by EleutherAI's lm-evaluation-harness: its own tasks, some of them on local rows, or one's own."""

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
"""What stands in a WinoGrande sentence where an option belongs."""


STDERR = "_stderr"


SEED = 1234
"""The harness's own, so that few-shot examples are those of its command line."""


Tasks = dict[str, Any]
"""Tasks and groups of the harness by name, under `tasks` and `groups`."""


Scores = dict[str, dict[str, float]]
"""By task: `rows`, and each metric with its standard error, such as `acc` and `acc_stderr`."""


class LocalTask(NamedTuple):
    """A task of the harness, to the letter of its prompts, on rows `{FIELD, choices, gold}` of a JSON lines file."""

    file: str
    field: str
    """The field with the text."""
    prompts: Mapping[str, Any]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


def with_options(row: Mapping[str, Any]) -> list[str]:
    """A WinoGrande sentence up to its blank, with each option in it: the contexts that are compared."""
    before, _, _ = row["sentence"].partition(BLANK)
    return [before + option for option in row["choices"]]


def behind_blank(row: Mapping[str, Any]) -> str:
    """The rest of a WinoGrande sentence, the same behind every option: what is scored."""
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
"""WinoGrande has no `acc_norm`: the text that is scored is the same for every option."""


def load_tasks(names: Collection[str], data: str | Path | None = None, include: str | Path | None = None) -> Tasks:
    """Tasks with their rows, to be given to `accuracy`.

    Args:
        names: tasks, groups or tags of the harness or of `include`.
        data: folder with files of rows for the tasks in `LOCAL`. Those are read from it, and the harness's other
            tasks, whose rows are on the hub, are not known.
        include: folder with YAML files of more tasks.

    Raises:
        TaskError: lm-eval is not installed, a task is unknown (the nearest is named) or does not load, a file of rows
            is missing, or a row is malformed.
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
    """What the harness measures of a causal language model, where it is and as it is, without a chat template.

    Args:
        model: dense or compressed.
        tokenizer: its own.
        tasks: from `load_tasks`.
        batch_size: sequences in a batch.
        limit: rows of each task, from the first; all when None.

    Raises:
        TaskError: the tokenizer has neither a token for the beginning of a text nor one for its end.
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
    """By task: `rows`, and each metric of every model, from the scores of each."""
    first, *_ = scores.values()
    return {
        task: {
            metric: value if metric == "rows" else {model: own[task][metric] for model, own in scores.items()}
            for metric, value in measured.items()
        }
        for task, measured in first.items()
    }


def table(compared: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `side_by_side` gave, for a terminal."""
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
    """What lists tasks, what wraps models, and what evaluates these on those."""
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"tasks need lm-eval ({error}); pip install zssvd-lightning[zero-shot]") from error
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
    """A task of `LOCAL` as the harness takes it. The rows are held in memory, so that no cache can be stale."""
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
    """What is wrong with a row; empty when nothing is."""
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
    """How many rows of a task were scored; nothing of a group."""
    counted = results["n-samples"].get(task)
    return {} if counted is None else {"rows": counted["effective"]}


def _scores(measured: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Metrics under their names, which the harness has as `METRIC,FILTER`."""
    for key, value in measured.items():
        metric, _, filter_ = key.partition(",")
        if filter_ and not isinstance(value, str):
            yield metric if filter_ == "none" else key, float(value)


def _is_nan(response: Any) -> bool:
    value = response[0] if isinstance(response, tuple) else response
    return isinstance(value, float) and math.isnan(value)


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Has the harness log from `level` on."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
