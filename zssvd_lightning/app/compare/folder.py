"""The output folder of a comparison: what it may hold, and who may write to it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zssvd_lightning.app.compare.results import NAMES
from zssvd_lightning.errors import OutputError

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None  # type: ignore[assignment]


CELLS, CALIBRATION = "cells", "calibration"


LOCK = ".lock"
"""File in `CELLS` that the comparison which is at work in the folder has locked."""


OWN = {
    "": re.compile("|".join(map(re.escape, NAMES))),
    CELLS: re.compile(r"(dense|.+-(0\.\d+|\d(\.\d+)?e-\d+)--?\d+)\.(json|log)"),
    CALIBRATION: re.compile(r"seed--?\d+-[0-9a-f]{12}\.(pt|json|log)"),
}
"""Names of the files that a comparison writes, by their folder."""


UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""What is left when writing a file is interrupted, as `replacing_file` names it."""


def check_folder(path: str | Path) -> Path:
    """The output folder, when it holds nothing but what a comparison wrote. Raises OutputError."""
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
    """Whether a comparison writes what is there in `folder`, or has begun to."""
    return bool(OWN[folder].fullmatch(entry.name)) or _is_unfinished(entry, folder)


def clear_unfinished(path: Path) -> None:
    """Removes what was left when writing files was interrupted."""
    for folder in OWN:
        for entry in list((path / folder).glob(".*")):
            if _is_unfinished(entry, folder):
                shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Makes the folders, and keeps other comparisons out of them within the block, where the system can.

    Raises:
        OutputError: they cannot be made, or another comparison is at work.
    """
    try:
        (path / CELLS).mkdir(parents=True, exist_ok=True)
        lock = (path / CELLS / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error}") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another comparison writes to {path}; wait for it, or name another folder"
                ) from error
            except OSError:  # a file system without locks
                pass
        with suppress(FileExistsError):
            (path / CALIBRATION).mkdir()
        yield


def _is_unfinished(entry: Path, folder: str) -> bool:
    """Whether it is what was left when writing it was interrupted."""
    named = UNFINISHED.fullmatch(entry.name)
    return named is not None and bool(OWN[folder].fullmatch(named[1]))
