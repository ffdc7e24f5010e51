"""Scripts in processes of their own, which begin with packages loaded.

One process loads them, and is copied for every script, which saves the seconds that loading takes.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

OTHERS = ("torch", "transformers.modeling_utils", "transformers.models.auto")
"""For scripts that take what this package has written to where it is not."""
PACKAGE = ("lightning.pytorch.cli", "zssvd_lightning.app.run", "support.killed_run")
"""For recipes."""

SERVE = "import sys; sys.path.append(sys.argv[1]); from support.fresh import serve; serve(sys.argv[2:])"


def run(
    code: str,
    *arguments: object,
    check: bool = True,
    loaded: tuple[str, ...] = OTHERS,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -c CODE ARGUMENTS` in the working directory; raises with its errors when it fails and is checked."""
    server = _server(loaded)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder) / "out", Path(folder) / "err"
        asked = {
            "code": code,
            "arguments": list(map(str, arguments)),
            "environment": dict(os.environ) if environment is None else environment,
            "directory": str(Path.cwd()),
            "files": [str(printed), str(errors)],
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        ended = int(server.stdout.readline())
        done = subprocess.CompletedProcess([code, *arguments], ended, printed.read_text(), errors.read_text())
    assert ended == 0 or not check, done.stderr
    return done


@functools.cache
def _server(loaded: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process that is copied; it ends with this one, which closes its input."""
    command = [sys.executable, "-c", SERVE, str(Path(__file__).parents[1]), *loaded]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(loaded: list[str]) -> None:
    """Copies this process for every line of its input, and prints how each copy has ended."""
    for name in loaded:
        __import__(name)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(code: str, arguments: list[str], environment: dict[str, str], directory: str, files: list[str]) -> None:
    """Runs a script, and ends the process as Python does."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *arguments]
    ended = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as asked:
        ended = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  (printed, as Python does)
        traceback.print_exc()
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
