"""Rows of multiple-choice tasks in JSON lines files, and the prompts of the harness for them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zssvd_lightning._files import checked_path
from zssvd_lightning.errors import TaskError

ROWS = ".jsonl"
"""Extension of files of rows, by which they are told from names of tasks."""


BLANK = "_"
"""Placeholder for the option in a WinoGrande sentence."""


class LocalTask(NamedTuple):
    """Task with the exact prompts of the harness, on rows `{FIELD, choices, gold}` of a JSON lines file."""

    file: str
    field: str
    """Name of the field with the text, by which a file of any name is told to be of this task."""
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
"""Prompts of the tasks whose choices are what is scored.

In WinoGrande, choices are the contexts. There the harness takes the index of the right one from `doc_to_text`, and the
text that is scored from `doc_to_target`.
"""


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


class RowsFile(NamedTuple):
    """File of rows, as the task of the harness that it stands for."""

    title: str
    """Name of the task: that of `LOCAL`, or of the file without its extension."""
    path: Path
    task: LocalTask | None
    """Task whose rows it must have; None for that whose field the first row has."""


def rows_file(name: str, data: str | Path | None) -> RowsFile | None:
    """Return the file with the rows of a task of `load_tasks`; None if the harness has them.

    Raises:
        TaskError: no file can have this name.
    """
    task = None if data is None else LOCAL.get(name)
    if task is None and not name.endswith(ROWS):
        return None
    path = checked_path(name if task is None else task.file, TaskError, "file of rows")
    title = path.stem if task is None else name
    return RowsFile(title, path if data is None else checked_path(data, TaskError, "folder of rows") / path, task)


def read_rows(file: RowsFile) -> tuple[LocalTask, list[dict[str, Any]]]:
    """Read a file of rows, and check each of them.

    Returns:
        The task, and its rows without other fields.

    Raises:
        TaskError: the file cannot be read or holds no rows, or a row is malformed; the message names the line.
    """
    path, rows = file.path, list(_json_rows(file.path))
    if not rows:
        raise TaskError(f"{path} holds no rows")
    task = file.task or _task_of(path, *rows[0])
    for number, row in rows:
        if problem := _problem(row, task):
            raise TaskError(f"{path}, line {number}: {problem}; rows are {{{task.field}, choices, gold}}")
    return task, [{key: row[key] for key in (task.field, "choices", "gold")} for _, row in rows]


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the content of each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise TaskError(f"cannot read the rows {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}, line {number} is not JSON: {error}") from error


def _task_of(path: Path, number: int, row: Any) -> LocalTask:
    """Return the task whose field of text the first row of a file has."""
    found = [task for task in LOCAL.values() if isinstance(row, dict) and task.field in row]
    if len(found) != 1:
        fields = ", ".join(repr(task.field) for task in LOCAL.values())
        raise TaskError(f"{path}, line {number}: rows have one of the fields {fields}, with choices and gold beside it")
    return found[0]


def _problem(row: Any, task: LocalTask) -> str:
    """Return a description of the error in a row; empty if there is none."""
    if not isinstance(row, dict) or not isinstance(text := row.get(task.field), str) or not text.strip():
        return f"no text {task.field!r}"
    if task.field == "sentence" and not behind_blank(row):
        return f"no blank {BLANK!r} in the sentence, or no text after it"
    choices, gold = row.get("choices"), row.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return f"choices {choices!r} are not two texts or more"
    if broken := [each for each in (text, *choices) if not _is_unicode(each)]:
        return f"half of a character in {broken[0]!r}"
    if type(gold) is not int or gold not in range(len(choices)):
        return f"gold {gold!r} is not the index of a choice"
    return ""


def _is_unicode(text: str) -> bool:
    """Return whether a text has no surrogate without its other half, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
