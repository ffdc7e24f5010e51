"""Runs block by block, as processes of their own that end by a signal at a chosen moment, and go on."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from support.models import tiny_llama, token_batches
from support.processes import context
from zssvd_lightning import compress
from zssvd_lightning.app.cli import main
from zssvd_lightning.serialization.unfinished import UnfinishedFolder, _Writer

SETTINGS: dict[str, Any] = {"preset": "best", "corrections": 1, "correction_batches": 1}


class End(NamedTuple):
    """Moment at which a process sends itself a signal."""

    place: str
    """`committed`, `listing` (before the list of what is finished is replaced) or `writing` (within a file)."""
    number: int
    signal: int


def compressed(folder: Path, *, keeps: bool = True) -> None:
    """Compresses a tiny model and leaves `end.pt`."""
    torch.manual_seed(0)
    model = tiny_llama()
    where = folder / "kept" if keeps else None
    batches = token_batches(4)
    found = compress(model, batches, prune_ratio=0.3, memory="blocks", resume_in=where, progress=False, **SETTINGS)
    ranks = {name: layer.rank for name, layer in found.layers.items()}
    torch.save({"weights": model.state_dict(), "ranks": ranks, "losses": found.losses}, folder / "end.pt")


def command(folder: Path, *arguments: str) -> None:
    """Runs the command line."""
    sys.argv = ["zssvd", *arguments]
    main()


def start(folder: Path, work: Callable[..., None], *args: Any, end: End | None = None, **settings: Any) -> int:
    """Calls `work` in a new process; returns its exit code, negative for the signal that ended it."""
    (folder / "scratch").mkdir(exist_ok=True)
    process = context().Process(target=_run, args=(folder, work, args, settings, end))
    process.start()
    process.join()
    assert list((folder / "scratch").iterdir()) == []
    return process.exitcode


def _run(folder: Path, work: Callable[..., None], args: Any, settings: dict[str, Any], end: End | None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background of a shell
    tempfile.tempdir = str(folder / "scratch")
    if end is not None:
        owner, method, after = {
            "committed": (UnfinishedFolder, "commit", True),
            "listing": (UnfinishedFolder, "_replace_list", False),
            "writing": (_Writer, "write", True),
        }[end.place]
        _sending(owner, method, end, after)
    work(folder, *args, **settings)


def _sending(owner: type, method: str, end: End, after: bool) -> None:
    called, left = getattr(owner, method), [end.number]

    def counted(*args: Any, **settings: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), end.signal)
        found = called(*args, **settings)
        if left[0] == 0 and after:
            os.kill(os.getpid(), end.signal)
        return found

    setattr(owner, method, counted)
