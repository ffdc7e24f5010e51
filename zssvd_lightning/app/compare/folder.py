"""Output folder of a comparison: its allowed content and its lock."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zssvd_lightning import _files
from zssvd_lightning.app.compare.results import NAMES
from zssvd_lightning.errors import OutputError

CELLS, CALIBRATION = "cells", "calibration"


LOCK = ".lock"
"""File in `CELLS` that a running comparison locks."""


OWN = {
    "": re.compile("|".join(map(re.escape, NAMES))),
    CELLS: re.compile(r"(dense|check|.+-(0\.\d+|\d(\.\d+)?e-\d+)--?\d+)\.(json|log)"),
    CALIBRATION: re.compile(r"seed--?\d+-[0-9a-f]{12}\.(pt|json|log)"),
}
"""Patterns of the names of files that a comparison writes, by folder."""


UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""Pattern of the names that `replacing_file` gives to temporary entries, which an interrupted write leaves behind."""


def check_folder(path: str | Path) -> Path:
    """Return the absolute path of the output folder.

    Raises:
        OutputError: the path is a file, or the folder has content that no comparison wrote.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    known = [path / folder for folder in (CELLS, CALIBRATION) if (path / folder).is_dir()]
    foreign = [
        str(entry.relative_to(path))
        for folder in OWN
        for entry in (path / folder).glob("*")
        if not is_own(entry, folder) and entry not in [*known, path / CELLS / LOCK]
    ]
    if foreign:
        raise OutputError(
            f"output {path} holds {', '.join(sorted(foreign)[:3])}{', ...' if len(foreign) > 3 else ''}, which is of "
            "no comparison; name an empty or new folder"
        )
    return path


def is_own(entry: Path, folder: str) -> bool:
    """Return True if a comparison wrote an entry of `folder`, completely or in part."""
    return bool(OWN[folder].fullmatch(entry.name)) or _is_unfinished(entry, folder)


def clear_unfinished(path: Path) -> None:
    """Remove the temporary entries of interrupted writes."""
    for folder in OWN:
        for entry in list((path / folder).glob(".*")):
            if _is_unfinished(entry, folder):
                shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Create the folders and lock them against other comparisons within the block, where the system supports locks.

    Raises:
        OutputError: the folders cannot be created, or another comparison is running in them.
    """
    try:
        (path / CELLS).mkdir(parents=True, exist_ok=True)
        lock = (path / CELLS / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error}") from error
    with lock:
        _files.lock(lock, f"another comparison writes to {path}; wait for it, or name another folder")
        with suppress(FileExistsError):
            (path / CALIBRATION).mkdir()
        yield


def _is_unfinished(entry: Path, folder: str) -> bool:
    """Return True if an entry is the temporary entry of an interrupted write."""
    named = UNFINISHED.fullmatch(entry.name)
    return named is not None and bool(OWN[folder].fullmatch(named[1]))
