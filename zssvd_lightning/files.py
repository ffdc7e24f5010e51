"""Writing files and folders so that an interrupted run loses nothing."""

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from zssvd_lightning.errors import OutputError

MARKER = "report.json"
"""Lists, under `files`, what this package wrote into a folder; a folder that holds nothing else may be replaced."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
    "modeling_zssvd.py",
    "zssvd_modules.py",
    "model.onnx*",
    "README.md",
)
"""What saved models consist of; a folder of a compressed one, or of an ONNX graph, may be replaced as well."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2."""


def check_output(path: str | Path) -> Path:
    """The output folder, when it may be written: absent, empty, or holding nothing but what this package wrote.

    A folder with a dense model is not to be replaced, since it may be the one that compression began with.

    Raises:
        OutputError: it is a file, or holds something this package did not write.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    if path.exists() and (foreign := sorted(_entries(path) - _written(path / MARKER))):
        raise OutputError(
            f"output {path} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, which this package "
            "did not write; name an empty or new folder"
        )
    return path


def _entries(folder: Path) -> set[str]:
    """Names of what is in a folder; without those of its model, where this package wrote it."""
    names = {entry.name for entry in folder.iterdir()}
    if "model.onnx" in names or _config(folder).get("model_type") == "zssvd":
        names = {name for name in names if not any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)}
    return names


def _config(folder: Path) -> dict[str, Any]:
    found = _json(folder / "config.json")
    return found if isinstance(found, dict) else {}


def _written(report: Path) -> set[str]:
    try:
        return set(_json(report)["files"])
    except (KeyError, TypeError):
        return set()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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
    """Puts `new` in the place of `path`, and removes what was there."""
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        old = path.with_name(f"{new.name}.old")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Has two folders change places in one step, so that neither is ever missing; False where the system cannot."""
    with suppress(OSError, AttributeError):  # no C library, or one without the call
        exchange = ctypes.CDLL(None).renameat2
        failed: int = exchange(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
        return failed == 0
    return False
