"""Text from packages, files and the hub, and windows of tokens cut from it."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from zssvd_lightning._validation import needs_extra
from zssvd_lightning.errors import TextError

DEFAULT_FIELD = "text"


HELD_OUT_EVERY = 10
"""Interval of the `test` split: every tenth text of a package, in name order; the other texts are `train`."""


def load_text(source: str) -> str:
    """Load the text of a source as one string.

    Args:
        source: `package:NAME` (the `.txt` files of an installed distribution; append `:train` or `:test` for a fixed
            split by file), a local `.txt`, `.raw`, `.jsonl` or `.parquet` file, or `datasets:NAME[:CONFIG]:SPLIT`.
            `#FIELD` at the end names the field to read from rows; the default is `text`.

    Raises:
        TextError: the source has none of these forms, cannot be read, lacks the field or has no text.
        MissingExtraError: the source needs the datasets library, which is not installed.
    """
    location, _, named_field = source.partition("#")
    field = named_field or DEFAULT_FIELD
    if location.startswith("package:"):
        text = _package_text(location.removeprefix("package:"))
    elif location.startswith("datasets:"):
        text = _dataset_text(location.removeprefix("datasets:"), field)
    else:
        text = _file_text(Path(location).expanduser(), field)
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
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return Tokens(ids[0], bos if tokenizer("a")["input_ids"][:1] == [bos] else None)


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
    """Dataset of windows (N, length) for causal language modeling; the labels are the inputs."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _package_text(name_and_split: str) -> str:
    name, _, split = name_and_split.partition(":")
    if split not in ("", "train", "test"):
        raise TextError(f"package:{name_and_split} names split {split!r}; there are 'train' and 'test'")
    try:
        files = importlib.metadata.files(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise TextError(f"package {name!r} is not installed; pip install {name}") from error
    texts = sorted((f for f in files or () if f.suffix == ".txt" and ".dist-info" not in str(f)), key=str)
    if split:
        texts = [f for i, f in enumerate(texts) if (i % HELD_OUT_EVERY == 0) == (split == "test")]
    if not texts:
        raise TextError(f"package {name!r} holds no .txt file" + (f" for split {split!r}" if split else ""))
    return "\n\n".join(Path(str(f.locate())).read_text(encoding="utf-8") for f in texts)


def _dataset_text(name_and_split: str, field: str) -> str:
    parts = name_and_split.split(":")
    if len(parts) not in (2, 3):
        raise TextError(f"'datasets:{name_and_split}' is not of the form datasets:NAME[:CONFIG]:SPLIT")
    name, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    try:
        rows = _datasets().load_dataset(name, config, split=split)
    except (OSError, ValueError, ConnectionError) as error:
        raise TextError(f"cannot load dataset {name_and_split!r}: {error}") from error
    return _join(rows, field, f"datasets:{name_and_split}")


def _file_text(path: Path, field: str) -> str:
    if not path.is_file():
        raise TextError(
            f"text source {str(path)!r} is not a file; sources are package:NAME, a .txt, .raw, .jsonl or .parquet "
            "file, or datasets:NAME[:CONFIG]:SPLIT"
        )
    try:
        if path.suffix in (".txt", ".raw"):
            return path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return _join([json.loads(line) for line in lines if line.strip()], field, str(path))
        if path.suffix == ".parquet":
            return _join(_datasets().load_dataset("parquet", data_files=str(path), split="train"), field, str(path))
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read {path}: {error}") from error
    raise TextError(f"{path} ends in {path.suffix!r}; text files end in .txt, .raw, .jsonl or .parquet")


def _datasets() -> Any:
    """Import the datasets library; raise MissingExtraError if it is not installed."""
    with needs_extra("data", "parquet files and texts of the hub"):
        import datasets
    return datasets


def _join(rows: Any, field: str, source: str) -> str:
    texts = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise TextError(
                f"a row of {source} has no text field {field!r}; it has {fields}. Name one as {source}#FIELD"
            )
        texts.append(row[field])
    separator = "" if texts and all(re.search(r"\n$", t) for t in texts if t) else "\n\n"
    return separator.join(texts)
