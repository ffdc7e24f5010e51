"""Folder with what a run has finished, from which the same run goes on if it is interrupted."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from torch import Tensor

from zssvd_lightning._files import checked_path, lock
from zssvd_lightning._state_checks import FaultError, anything, entries, listed, mapped, text, whole
from zssvd_lightning.errors import OutputError, SavedModelError, shown
from zssvd_lightning.offload.pages import release_pages_of
from zssvd_lightning.serialization.integrity import digest

logger = logging.getLogger(__name__)

FORMAT = 1
"""Number of the format. A folder of another one is refused."""

LOCK, PROGRESS, NEW = "zssvd-lock", "zssvd-progress.json", ".new"
"""Names of the file that a running process locks, of the list of what is finished, and the ending of a file that is
being written."""

_OWN = re.compile(rf"{LOCK}|{re.escape(PROGRESS)}({re.escape(NEW)})?|zssvd-\d+\.pt")

_CONTENT = entries(
    {
        "format": whole,
        "run": mapped(text),
        "facts": mapped(anything),
        "entries": mapped(listed(text, 2)),
        "files": whole,
    }
)


class UnfinishedFolder:
    """Folder with the finished parts of one run, and what tells this run from others.

    What is committed is either in the folder as a whole or not at all, even if the process is killed meanwhile: files
    are written under new names, and count once the list of files names them, which is replaced in one step. The folder
    is removed if the block succeeds with the run that it holds, and, unless it was there before, if nothing was
    committed. Until `begin`, nothing in it changes.

    Args:
        path: the folder, which is created if it is missing.
        name: what messages call it.

    Attributes:
        path: absolute path.
        entries: file and SHA-256 digest of each entry.
        facts: plain values of the last commit.
        run: all that the results of the run in it depend on, by name; None if it is empty.

    Raises:
        OutputError: the path is a file, or the folder has content of others, is in use by another process, cannot be
            read or written, or is of another format.
    """

    def __init__(self, path: str | Path, name: str = "resume_in") -> None:
        self.path, self._name = checked_path(path, OutputError, name).absolute(), name
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{name} {self.path} is a file; name a folder")
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._ours = bool(self._made) or (self.path / LOCK).exists()
        self._lock = self._locked()
        self.run: dict[str, str] | None = None
        self.facts: dict[str, Any] = {}
        self.entries: dict[str, list[str]] = {}
        self._files, self._asked = 0, dict[str, str]()
        try:
            if (content := self._listed()) is not None:
                self.run, self.facts, self.entries = content["run"], content["facts"], content["entries"]
                self._files = content["files"]
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        succeeded = kind is None and bool(self._asked)
        with suppress(OSError, OutputError):  # Windows cannot remove a file that is open
            if succeeded:
                (self.path / PROGRESS).unlink(missing_ok=True)
            if self._asked:
                self._clear()
            if not (self.path / PROGRESS).exists():
                (self.path / LOCK).unlink()
                if succeeded or self._ours:
                    self._remove_folders()
        self._lock.close()

    def _remove_folders(self) -> None:
        """Remove the folder and those around it that were made for it, as far as they are empty."""
        with suppress(OSError):
            for folder in dict.fromkeys((self.path, *self._made)):
                folder.rmdir()

    def refuse_other(self, run: Mapping[str, str]) -> None:
        """Raise OutputError if the folder holds another run.

        Args:
            run: all that the results of the run depend on, by name.
        """
        before = run if self.run is None else self.run
        if others := sorted(key for key in before.keys() | run.keys() if before.get(key) != run.get(key)):
            told = "; ".join(
                f"{key} was {shown(before.get(key, 'missing'))} and is {shown(run.get(key, 'missing'))}"
                for key in others[:3]
            )
            raise OutputError(
                f"{self.path} holds what another run has finished before it was interrupted ({told}"
                f"{f', and {len(others) - 3} more' if len(others) > 3 else ''}); start that one again to go on with "
                "it, delete the folder, or name another"
            )

    def begin(self, run: Mapping[str, str]) -> None:
        """Begin a run, or go on with it. If something of it is damaged, warn and begin it from the start.

        Args:
            run: as for `refuse_other`.

        Raises:
            OutputError: the folder holds another run, or cannot be read.
        """
        self.refuse_other(run)
        if (damaged := self._damaged()) is not None:
            logger.warning("%s is not as it was written, so the run begins again from the start", self.path / damaged)
            (self.path / PROGRESS).unlink()
            self.run, self.facts, self.entries = None, {}, {}
        self._asked = dict(run)
        self._clear()

    def load(self, entry: str) -> Any:
        """Return the value of an entry, whose tensors are mapped from its file. Nothing in it is executed."""
        return torch.load(self.path / self.entries[entry][0], "cpu", mmap=True, weights_only=True)

    def commit(
        self, values: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None, drop: Collection[str] = ()
    ) -> None:
        """Store entries and plain values in one step. Call `begin` before.

        Args:
            values: entries to add or replace: nested plain types and tensors.
            facts: plain values to add or replace.
            drop: entries and plain values to remove.

        Raises:
            OutputError: the folder cannot be written, as on a full disk. Its content is as before.
        """
        kept = {name: entry for name, entry in self.entries.items() if name not in drop}
        told = {name: fact for name, fact in self.facts.items() if name not in drop} | dict(facts or {})
        try:
            for name, value in values.items():
                self._files += 1
                kept[name] = self._write(f"zssvd-{self._files:06}.pt", value)
            self._replace_list(kept, told)
            self.entries, self.facts = kept, told
        finally:
            self._clear()

    def _write(self, name: str, value: Any) -> list[str]:
        """Write a file, and return its name and digest."""
        needed, path = _nbytes(value), self.path / name
        try:
            self._refuse_too_little(needed)
            with path.open("wb", buffering=0) as file:
                _save(value, file)
                os.fsync(file.fileno())
            return [name, digest(path)]
        except (OSError, SavedModelError) as error:
            raise self._unwritable(needed, error) from error

    def _refuse_too_little(self, needed: int) -> None:
        if needed > shutil.disk_usage(self.path).free:
            raise OSError(errno.ENOSPC, "the disk has too little room")

    def _replace_list(self, kept: Mapping[str, list[str]], facts: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, "run": self._asked, "facts": facts, "entries": kept, "files": self._files}
        written = json.dumps(content, indent=1)
        new = self.path / f"{PROGRESS}{NEW}"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path / PROGRESS)
            _flush_folder(self.path)
        except OSError as error:
            raise self._unwritable(len(written), error) from error

    def _unwritable(self, needed: int, error: BaseException) -> OutputError:
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(self.path).free / 1e9:.3g} GB free)"
        return OutputError(
            f"cannot write {needed / 1e9:.3g} GB to {self.path}{free}: {error}; the model is as it was, and what was "
            "finished before is still there. Make room and start the run again to go on, or name another folder"
        )

    def _locked(self) -> IO[str]:
        """Return the open and locked lock file of the folder, after a check that all files in it are of this class."""
        in_use = f"another process uses {self.path}; wait for it, or name another folder"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            file = (self.path / LOCK).open("a", encoding="utf-8")
        except OutputError:
            raise
        except OSError as error:
            if self._made:
                self._remove_folders()
            raise OutputError(f"cannot write to {self.path}: {error}; name another folder") from error
        try:
            lock(file, in_use)
            self._refuse_removed(file, in_use)
        except BaseException:
            file.close()
            raise
        return file

    def _refuse_foreign(self) -> None:
        names = (entry.name for entry in self.path.iterdir())
        if foreign := sorted(name for name in names if not name.startswith(".") and not _OWN.fullmatch(name)):
            raise OutputError(
                f"{self._name} {self.path} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, which "
                "no interrupted run has left; name an empty or new folder"
            )

    def _refuse_removed(self, file: IO[str], in_use: str) -> None:
        """Raise OutputError if another process has removed the lock file since it was opened."""
        path = self.path / LOCK
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise OutputError(in_use)

    def _damaged(self) -> str | None:
        """Return the name of a file that is missing or not as it was written; None if there is none."""
        for name, written in self.entries.values():
            path = self.path / name
            try:
                if not path.exists() or digest(path) != written:
                    return name
            except (OSError, SavedModelError) as error:
                raise self._unreadable(name, error) from error
        return None

    def _unreadable(self, name: str, error: BaseException) -> OutputError:
        return OutputError(
            f"cannot read {name} in {self.path}: {error}; nothing was removed. Make it readable and start the run "
            "again to go on, or name another folder"
        )

    def _listed(self) -> dict[str, Any] | None:
        """Return the content of the list on the disk; None without one. Raises OutputError if it is not understood."""
        try:
            return _understood(json.loads((self.path / PROGRESS).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(PROGRESS, error) from error
        except (ValueError, RecursionError, FaultError) as error:
            raise OutputError(
                f"{PROGRESS} in {self.path} is damaged, or of another release ({error}), so that it is not known which "
                "run has finished what is there; nothing was removed. Delete the folder, or name another"
            ) from error

    def _clear(self) -> None:
        """Remove the files that the list on the disk does not name."""
        content = self._listed() or {"entries": {}}
        named = {LOCK, PROGRESS, *(file for file, _ in content["entries"].values())}
        for path in self.path.iterdir():
            if path.name not in named and _OWN.fullmatch(path.name):
                with suppress(OSError):  # Windows cannot remove a file that is mapped
                    path.unlink()


def _understood(content: Any) -> dict[str, Any]:
    """Return the content of a list of what is finished. Raises FaultError if it is not as it was written."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FaultError(f"it is not of format {FORMAT}")
    _CONTENT(content, PROGRESS)
    if not all(_OWN.fullmatch(file) for file, _ in content["entries"].values()):
        raise FaultError("it names files of others")
    return content


def _save(value: Any, file: Any) -> None:
    """Write a value to an unbuffered file, and raise what a write raised, which torch may report as another error."""
    writer = _Writer(file)
    try:
        torch.save(value, cast("IO[bytes]", writer))  # of which it only writes
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise


class _Writer:
    """File for `torch.save`."""

    def __init__(self, file: Any) -> None:
        self.error: BaseException | None = None
        self._file = file

    def write(self, content: Any) -> int:
        """Write all bytes of `content`."""
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
            release_pages_of(memoryview(content))  # tensors that were read from scratch files are written once
        except BaseException as error:
            self.error = error
            raise
        return size

    def flush(self) -> None:
        """Do nothing, since nothing is buffered."""


def _nbytes(value: Any) -> int:
    """Return the bytes of the tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_nbytes, parts))


def _flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk, where the system can."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
