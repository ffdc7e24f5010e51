"""Atomic writing of files and folders, so that an interrupted run loses nothing, and text in JSON."""

import ctypes
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from zssvd_lightning.errors import OutputError, ZSSVDError

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MANIFEST = "zssvd.json"
"""File that lists what this package wrote into a folder. A folder that contains nothing else may be replaced."""


CARD = "README.md"
"""Model card. If edited by hand, it no longer counts as written by this package."""


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants for Linux's `renameat2`."""


NAME_KEPT = 40
"""Number of characters of a name that its temporary neighbor begins with, so that no file system finds it too long."""


LONGEST_NAME = 255
"""Maximum number of bytes in a name, where the file system does not tell."""


def checked_path(path: str | Path, error: type[ZSSVDError], what: str = "output") -> Path:
    """Return a path with `~` expanded, which may or may not exist.

    Args:
        path: path of a file or folder.
        error: class of the error to raise.
        what: subject of the message.

    Raises:
        ZSSVDError: of class `error`, if no file can have this path: it contains a NUL character, a name in it is too
            long, it leads through a file or through links without end, or there is no such user.
    """
    shown = f"{what} {str(path)[:80]!r}"
    if "\0" in str(path):
        raise error(f"{shown} contains a NUL character; take another name")
    try:
        expanded = Path(path).expanduser()
        existing = _existing(expanded.absolute())
    except (OSError, RuntimeError) as problem:
        raise error(f"{shown} is not possible: {problem}") from problem
    if existing != expanded.absolute() and not existing.is_dir():
        raise error(f"{shown} leads through {existing}, which is a file; take another folder")
    longest = _longest_name(existing)
    if too_long := [name for name in expanded.parts if len(os.fsencode(name)) > longest]:
        raise error(
            f"{shown} has a name of {len(os.fsencode(too_long[0]))} bytes, but the file system takes at most "
            f"{longest}; shorten it"
        )
    return expanded


def _existing(path: Path) -> Path:
    """Return the longest part of an absolute path that exists."""
    for part in (path, *path.parents):
        try:
            part.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                continue
            raise
        return part
    return path


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # not on every system
        return LONGEST_NAME


def check_output(path: str | Path, source: str | Path | None = None) -> Path:
    """Return the resolved output folder if it may be written: missing, empty, or with only files of this package.

    Args:
        path: output folder.
        source: input folder, if the input is a folder.

    Raises:
        OutputError: the path is a file, is the source, is or contains the working directory, contains other files, or
            cannot be written.
    """
    path = checked_path(path, OutputError).resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    if source is not None and path == checked_path(source, OutputError, "source").resolve():
        raise OutputError(f"output {path} is what is read from; name another folder")
    if Path.cwd().is_relative_to(path):
        raise OutputError(f"output {path} is the working directory, or around it; name a folder in it")
    if path.exists() and (foreign := sorted(_files(path) - _ours(path))):
        raise OutputError(
            f"output {path} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, which this package "
            "did not write; name an empty or new folder"
        )
    if not os.access(folder := _existing(path.parent), os.W_OK):
        raise OutputError(f"output {path} cannot be written, because {folder} is not writable; name another folder")
    return path


def check_file(path: str | Path) -> Path:
    """Return the absolute path of a file if it may be written: missing, or a file.

    Raises:
        OutputError: the path is impossible, is a folder, or cannot be written.
    """
    path = checked_path(path, OutputError).absolute()
    if path.is_dir():
        raise OutputError(f"output {path} is a folder; name a file")
    if not os.access(folder := _existing(path.parent), os.W_OK):
        raise OutputError(f"output {path} cannot be written, because {folder} is not writable; name another file")
    return path


def _files(folder: Path) -> set[str]:
    """Return the names of files, links and empty folders inside, relative to the folder."""
    return {
        str(entry.relative_to(folder))
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or not any(entry.iterdir())
    }


def _ours(folder: Path) -> set[str]:
    """Return the names in the manifest, except a model card that was changed since."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names, card = set(told["files"]), told["card"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return names if card == _card(folder) else names - {CARD}


def _card(folder: Path) -> str | None:
    path = folder / CARD
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _finish(folder: Path) -> None:
    """Write the manifest and flush all files to disk."""
    names = sorted(_files(folder) | {MANIFEST})
    manifest = json.dumps({"files": names, "card": _card(folder)}, indent=2)
    (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb+") as file:
                os.fsync(file.fileno())


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`. It replaces `path` if the block succeeds, and is deleted if it fails.

    Raises:
        OutputError: `path` may not be replaced, or writing failed (for example a full disk or missing permissions).
    """
    path = check_output(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:NAME_KEPT]}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {path}: {error}") from error
    try:
        yield temporary
        _finish(temporary)
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
    """Yield the path of a temporary file with the same name, which replaces `path` if the block succeeds.

    Raises:
        OutputError: writing failed. An existing file is untouched.
    """
    path = checked_path(path, OutputError).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:NAME_KEPT]}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}; what was there before is untouched") from error


def lock(file: IO[Any], in_use: str) -> None:
    """Lock an open file against other processes until it is closed; warn where the file system has no locks.

    Raises:
        OutputError: another process has locked it; the message is `in_use`.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(in_use) from error
        except OSError:
            _warn_of_no_locks(Path(file.name).parent)


@cache
def _warn_of_no_locks(folder: Path) -> None:
    logger.warning("this file system has no locks; start only one process on %s", folder)


def list_in_manifest(file: Path) -> None:
    """Add a file to the manifest of its folder, so that the folder may still be replaced; nothing if there is none.

    Raises:
        OutputError: the manifest cannot be written.
    """
    manifest = file.parent / MANIFEST
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        names = {*told["files"], file.name}
    except (OSError, ValueError, KeyError, TypeError):
        return
    if names != set(told["files"]):
        with replacing_file(manifest) as temporary:
            content = json.dumps(told | {"files": sorted(names)}, indent=2)
            temporary.write_text(content + "\n", encoding="utf-8")


def _swap(new: Path, path: Path) -> None:
    """Replace the folder `path` by `new`, and delete the previous one."""
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = path.with_name(f"{new.name}.old")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically, so that neither is ever missing. Return False if the system cannot."""
    with suppress(OSError, AttributeError):  # no C library, or renameat2 is missing
        exchange = ctypes.CDLL(None).renameat2
        failed: int = exchange(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
        return failed == 0
    return False


def json_of(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Return plain types as JSON. JSON has no NaN and no infinity, so they become null, with a warning."""
    lost: list[str] = []
    text = json.dumps(_finite(value, "", lost), indent=indent, allow_nan=False)
    if lost:
        logger.warning("not finite, and so null in the JSON: %s", ", ".join(lost))
    return text


def _finite(value: Any, name: str, lost: list[str]) -> Any:
    """Return a value without numbers that are not finite, and add their dotted names and values to `lost`."""
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{name}.{key}" if name else str(key), lost) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{name}[{index}]", lost) for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{name} ({value})")
        return None
    return value
