"""Runs of several processes, each a real one of its own, that find each other as on a cluster."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

TIMEOUT = 240
LOADED = ["support.killed_run", "support.parallel", "peft"]
"""What processes need, the last only for some recoveries, for which it would take seconds in each of them."""


def context() -> ForkServerContext:
    """Whose processes start at once, since their server has imported everything; it takes its paths from here."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LOADED)
    return server


def start(
    folder: Path,
    size: int,
    work: Callable[..., None],
    *args: Any,
    timeout: float = TIMEOUT,
    nodes: int = 1,
    wait_for: Sequence[int] | None = None,
) -> list[int | None]:
    """Runs `work(rank, size, folder, *args)` on `size` processes; their exit codes, None for those still going.

    What a process prints or raises is in `folder/RANK.log`. It waits for those in `wait_for`, or all, and so long.
    """
    port = free_port()
    processes = [
        context().Process(target=_run, args=(rank, size, nodes, port, folder, work, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for rank in range(size) if wait_for is None else wait_for:
        processes[rank].join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def check(folder: Path, codes: list[int]) -> None:
    """Raises with what the processes said when one of them failed."""
    if any(code != 0 for code in codes):
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
        raise AssertionError(f"exit codes {codes}\n{logs}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(
    rank: int, size: int, nodes: int, port: int, folder: Path, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    per_node = size // nodes
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % per_node),
        "NODE_RANK": str(rank // per_node),
    }
    with (folder / f"{rank}.log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            import torch

            torch.set_num_threads(1)
            work(rank, size, folder, *args)
        except BaseException:  # noqa: BLE001  (it goes to the log, and the process ends with it)
            traceback.print_exc()
            log.flush()
            os._exit(1)
