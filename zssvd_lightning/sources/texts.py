"""Text from packages, files and the hub, and windows of tokens cut from it."""

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from zssvd_lightning._files import checked_path
from zssvd_lightning._validation import needs_extra
from zssvd_lightning.errors import TextError
from zssvd_lightning.sources.tokenizing import token_ids

T = TypeVar("T")

DEFAULT_FIELD = "text"


HELD_OUT_EVERY = 10
"""Interval of the `test` split: every tenth text of a source, in name order; the other texts are `train`."""

SPLITS = ("", "train", "test")
"""Splits of a source, the first of which is all of it."""


def load_text(source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Load the text of a source as one string.

    Args:
        source: `package:NAME` (the `.txt` files of an installed distribution; append `:train` or `:test` for a fixed
            split by file), `python` (the language reference that comes with Python; the same splits), a local `.txt`,
            `.raw`, `.jsonl` or `.parquet` file, or `datasets:NAME[:CONFIG]:SPLIT`.
            `#FIELD` at the end names the field to read from rows; the default is `text`. A field with a list of
            messages, `[{"role": ..., "content": ...}, ...]`, is read through the chat template of the tokenizer.
        tokenizer: tokenizer of the model; None if no field holds messages.

    Raises:
        TextError: the source has none of these forms, cannot be read, lacks the field or has no text, or there is no
            chat template for its messages. The message names the row.
        MissingExtraError: the source needs the datasets library, which is not installed.
    """
    location, _, named_field = source.partition("#")
    field = named_field or DEFAULT_FIELD
    if location.startswith("package:"):
        text = _package_text(location.removeprefix("package:"))
    elif location.partition(":")[0] == "python":
        text = _python_text(location)
    elif location.startswith("datasets:"):
        text = _dataset_text(location.removeprefix("datasets:"), Rows(field, location, tokenizer))
    else:
        text = _file_text(checked_path(location, TextError, "text source"), Rows(field, location, tokenizer))
    if not text.strip():
        raise TextError(f"text source {source!r} is empty")
    return text


class Tokens(NamedTuple):
    """Whole text, tokenized once."""

    ids: Tensor
    """Token ids (T,), without special tokens."""
    bos: int | None = None
    """Token with which every window begins, as in the training of the model; None for windows without such a token."""

    def cut(self, length: int) -> Tensor:
        """Return every window (N, length) that fits, without overlap."""
        own = length if self.bos is None else length - 1
        cut = self.ids[: len(self.ids) // own * own].view(-1, own)
        return cut if self.bos is None else torch.cat([cut.new_full((len(cut), 1), self.bos), cut], 1)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenize a text; its windows begin with the BOS token if the tokenizer begins texts with it."""
    ids, bos = token_ids(text, tokenizer), tokenizer.bos_token_id
    return Tokens(ids, bos if tokenizer("a")["input_ids"][:1] == [bos] else None)


def windows(tokens: Tokens, length: int, count: int, source: str) -> Tensor:
    """Return the first `count` windows (count, length) of a text, without overlap.

    Args:
        tokens: the tokenized text.
        length: number of tokens in a window.
        count: number of windows; 0 for all that fit.
        source: name of the text, for the error message.

    Raises:
        TextError: the text has fewer windows.
    """
    return _enough_windows(tokens, length, count, source)[: count or None]


def sampled_windows(tokens: Tokens, length: int, count: int, seed: int, source: str) -> Tensor:
    """Draw `count` windows (count, length) of a text at random, without replacement and without overlap.

    Args:
        tokens: the tokenized text.
        length: number of tokens in a window.
        count: number of windows; 0 for all that fit.
        seed: seed of the draw.
        source: name of the text, for the error message.

    Raises:
        TextError: the text has fewer windows.
    """
    every = _enough_windows(tokens, length, count, source)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[: count or None]]


def hold_out(tokens: Tokens, length: int, count: int, seed: int, source: str) -> tuple[Tensor, Tokens]:
    """Take windows out of a text at random: `count`, but at most a tenth of those that fit, and at least one.

    Args:
        tokens: the tokenized text.
        length: number of tokens in a window.
        count: number of windows.
        seed: seed of the draw.
        source: name of the text, for the error message.

    Returns:
        The windows (N, length), and the tokens of the rest of the text, in order.

    Raises:
        TextError: the text has fewer than two windows.
    """
    every = _enough_windows(tokens, length, 2, source)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    drawn = order[: max(1, min(count, len(every) // 10))]
    own = length if tokens.bos is None else length - 1
    stays = torch.ones(len(tokens.ids), dtype=torch.bool)
    stays[: len(every) * own].view(-1, own)[drawn] = False
    return every[drawn], tokens._replace(ids=tokens.ids[stays])


def _enough_windows(tokens: Tokens, length: int, count: int, source: str) -> Tensor:
    """Return all windows that fit; raise TextError if there are fewer than `count`, or none."""
    every = tokens.cut(length)
    if len(every) < max(count, 1):
        raise TextError(
            f"text {source!r} has {len(tokens.ids)} tokens, that is {len(every)} windows of {length}, but "
            f"{max(count, 1)} are needed; use a longer text, or fewer or shorter windows"
        )
    return every


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Dataset of windows (N, length) for causal language modeling; the labels are the inputs.

    Args:
        input_ids: the windows.
        length: number of items; after the last window, the first comes again. N when None.
    """

    def __init__(self, input_ids: Tensor, length: int | None = None) -> None:
        self.input_ids = input_ids
        self.length = len(input_ids) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"window {index} of {self.length}")
        ids = self.input_ids[index % len(self.input_ids)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _package_text(name_and_split: str) -> str:
    name, _, split = name_and_split.partition(":")
    _check_split(f"package:{name_and_split}", split)
    if not name:
        raise TextError(f"'package:{name_and_split}' names no package; write package:NAME[:SPLIT]")
    try:
        files = importlib.metadata.files(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise TextError(f"package {name!r} is not installed; pip install {name}") from error
    texts = _part(sorted((f for f in files or () if f.suffix == ".txt" and ".dist-info" not in str(f)), key=str), split)
    if not texts:
        raise TextError(f"package {name!r} holds no .txt file" + (f" for split {split!r}" if split else ""))
    return "\n\n".join(_plain_text(Path(str(f.locate()))) for f in texts)


def _python_text(source: str) -> str:
    """Return the topics of the language reference that `help` shows, which is prose with examples of code."""
    split = source.partition(":")[2]
    _check_split(source, split)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(f"this Python has no language reference for text {source!r}; name another text") from error
    return "\n\n".join(topics[name] for name in _part(sorted(topics), split))


def _check_split(source: str, split: str) -> None:
    if split not in SPLITS:
        raise TextError(f"{source} names split {split!r}; there are 'train' and 'test'")


def _part(texts: list[T], split: str) -> list[T]:
    """Return the texts of a split, from those in name order."""
    return [each for i, each in enumerate(texts) if not split or (i % HELD_OUT_EVERY == 0) == (split == "test")]


class Rows(NamedTuple):
    """Reading of rows with a field of text or of messages."""

    field: str
    source: str
    """Name of the source, for error messages."""
    tokenizer: PreTrainedTokenizerBase | None

    def join(self, rows: Iterable[Any]) -> str:
        """Return the texts of all rows as one.

        Raises:
            TextError: a row lacks the field, or it is neither text nor messages that the tokenizer has a template for.
        """
        texts, chats = [], []
        for number, row in enumerate(rows, 1):
            value = self._value(row, number)
            chats.append(isinstance(value, list))
            texts.append(self._checked(self._chat(value, number) if isinstance(value, list) else value, number))
        ends_lines = bool(texts) and all(text.endswith("\n") for text in texts if text)
        return ("" if all(chats) or ends_lines else "\n\n").join(texts)

    def _value(self, row: Any, number: int) -> Any:
        """Return the text or the list of messages in a row."""
        value = row.get(self.field) if isinstance(row, dict) else None
        if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_message, value))):
            return value
        if isinstance(value, list):
            raise TextError(
                f"row {number} of {self.source} has a list in field {self.field!r}, but not one of messages with role "
                "and content"
            )
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise TextError(
            f"row {number} of {self.source} has no text field {self.field!r}; it has {fields}. Name one as "
            f"{self.source}#FIELD"
        )

    def _chat(self, messages: list[dict[str, Any]], number: int) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            which = "no tokenizer was given" if self.tokenizer is None else "the tokenizer of the model has none"
            raise TextError(
                f"field {self.field!r} of {self.source} holds messages, which need a chat template, and {which}; use "
                "the tokenizer of a chat model, or a field with text"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates are programs
            raise TextError(
                f"the chat template of the tokenizer does not take the messages in row {number} of {self.source}: "
                f"{error}"
            ) from error

    def _checked(self, text: str, number: int) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"row {number} of {self.source} has {text[error.start]!r} in field {self.field!r}, which is half of a "
                "character; correct the row, or remove it"
            ) from error
        return text


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _dataset_text(name_and_split: str, rows: Rows) -> str:
    parts = name_and_split.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise TextError(f"'datasets:{name_and_split}' is not of the form datasets:NAME[:CONFIG]:SPLIT")
    name, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    return rows.join(_loaded(f"dataset {name_and_split!r}", name, config, split=split))


def _file_text(path: Path, rows: Rows) -> str:
    if not path.is_file():
        raise TextError(
            f"text source {str(path)!r} is not a file; sources are package:NAME, python, a .txt, .raw, .jsonl or "
            ".parquet file, or datasets:NAME[:CONFIG]:SPLIT"
        )
    if path.suffix in (".txt", ".raw"):
        return _plain_text(path)
    if path.suffix == ".jsonl":
        return rows.join(_json_rows(path))
    if path.suffix == ".parquet":
        return rows.join(_loaded(str(path), "parquet", data_files=str(path), split="train"))
    raise TextError(f"{path} ends in {path.suffix!r}; text files end in .txt, .raw, .jsonl or .parquet")


def _plain_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read {path}: {error}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a file with one JSON value per line."""
    for number, line in enumerate(_plain_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise TextError(f"cannot read {path}: line {number} is no JSON: {reason}") from error


def _loaded(what: str, *arguments: Any, **keywords: Any) -> Any:
    """Return the rows that the datasets library loads.

    Raises:
        TextError: it cannot load them.
        MissingExtraError: the library is not installed.
    """
    with needs_extra("data", "parquet files and texts of the hub"):
        import datasets
    try:
        return datasets.load_dataset(*arguments, **keywords)
    except Exception as error:  # the library passes on errors of many others
        raise TextError(f"cannot read {what}: {type(error).__name__}: {error}") from error
