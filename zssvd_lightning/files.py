"""Writing files and folders so that an interrupted run loses nothing."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zssvd_lightning.errors import OutputError

MARKER = "report.json"
"""Lists, under `files`, what this package wrote into a folder; a folder that holds nothing else may be replaced."""


def check_output(path: str | Path) -> Path:
    """The output folder, when it may be written: absent, empty, or holding an earlier run and nothing else.

    Raises:
        OutputError: it is a file, or holds something this package did not write.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    if path.exists() and (foreign := sorted({entry.name for entry in path.iterdir()} - _written(path / MARKER))):
        raise OutputError(
            f"output {path} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, which no earlier run "
            "wrote; name an empty or new folder"
        )
    return path


def _written(report: Path) -> set[str]:
    try:
        return set(json.loads(report.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends well and is dropped when it does not.

    Raises:
        OutputError: `path` may not be replaced, or writing failed (a full disk, missing rights).
    """
    path = check_output(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {path}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _swap(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, of the same ending, which takes its place when the block ends well.

    Raises:
        OutputError: writing failed; what was there before is untouched.
    """
    path = Path(path).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}; what was there before is untouched") from error


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f"{new.name}.old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)
