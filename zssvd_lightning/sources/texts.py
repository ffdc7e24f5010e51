"""Real text from packages, files and the hub, and windows of tokens cut from it."""

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
"""Of a package's texts every tenth, in name order, is the `test` split, and the others are `train`."""


def load_text(source: str) -> str:
    """The text that `source` names, as one string.

    Args:
        source: `package:NAME` (the `.txt` files of an installed distribution; `:train` or `:test` behind it for a
            fixed split by file), a local `.txt`, `.raw`, `.jsonl` or `.parquet`, or `datasets:NAME[:CONFIG]:SPLIT`.
            `#FIELD` at the end names the field to read from rows; `text` when it is left out.

    Raises:
        TextError: the source is of no such form, cannot be read, lacks the field, or holds no text.
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
    """A whole text, tokenized once."""

    ids: Tensor
    """(T,), without special tokens."""
    bos: int | None = None
    """What every window of it begins with, as the model has learned that texts begin; None where they just begin."""

    def cut(self, length: int) -> Tensor:
        """All windows (N, length) that fit, without overlap."""
        own = length if self.bos is None else length - 1
        cut = self.ids[: len(self.ids) // own * own].view(-1, own)
        return cut if self.bos is None else torch.cat([cut.new_full((len(cut), 1), self.bos), cut], 1)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of a text, whose windows begin with the tokenizer's BOS token where it begins texts with that."""
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return Tokens(ids[0], bos if tokenizer("a")["input_ids"][:1] == [bos] else None)


def windows(tokens: Tokens, length: int, count: int, source: str) -> Tensor:
    """The first `count` windows (count, length) of tokens, cut without overlap; all that fit when count is 0.

    Raises:
        TextError: there are fewer.
    """
    return _enough_windows(tokens, length, count, source)[: count or None]


def sampled_windows(tokens: Tokens, length: int, count: int, seed: int, source: str) -> Tensor:
    """`count` windows (count, length) drawn without replacement from those of `windows`; all of them when count is 0.

    Raises:
        TextError: there are fewer.
    """
    every = _enough_windows(tokens, length, count, source)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[: count or None]]


def _enough_windows(tokens: Tokens, length: int, count: int, source: str) -> Tensor:
    """All windows that fit, when they are `count` or more. Raises TextError."""
    every = tokens.cut(length)
    if len(every) < max(count, 1):
        raise TextError(
            f"text {source!r} has {len(tokens.ids)} tokens, that is {len(every)} windows of {length}, but "
            f"{max(count, 1)} are needed; use a longer text, or fewer or shorter windows"
        )
    return every


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows (N, length) as causal language modeling examples, whose labels are their inputs."""

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
    """Import the datasets library. Raise MissingExtraError when it is not installed."""
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
