"""Common parts of command lines: usage, errors in one line, streams, tables and JSON."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from zssvd_lightning.errors import ZSSVDError

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)


HELP = {"-h", "--help"}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print an error of this package as one line on stderr, without a traceback, and exit with code 1."""
    try:
        yield
    except ZSSVDError as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        printable = message.encode("utf-8", "backslashreplace").decode("utf-8")
        typer.secho(printable, fg="red", err=True)
        raise SystemExit(1) from error


def start(main: Callable[..., None], usage: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the `main` of a script with a config file and `key=value` settings from the command line.

    Args:
        main: function that is called with the arguments.
        usage: text to print for `--help`, or if there are no arguments.
        arguments: the arguments; those of the process when None.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or HELP & {*given}:
        typer.echo((usage or "").strip(), err=not given)
        raise SystemExit(0 if given else 2)
    with errors_in_one_line():
        main(*given)


def as_json(result: Mapping[str, Any]) -> str:
    """Return a result as one JSON object. JSON has no NaN and no infinity, so they become null, with a warning."""
    lost: list[str] = []
    text = json.dumps(_finite(result, "", lost), allow_nan=False)
    if lost:
        logger.warning("not finite, and so null in the JSON: %s", ", ".join(lost))
    return text


@contextmanager
def streams(quiet: bool, as_json: bool = False) -> Iterator[None]:
    """Keep stdout for the result within the context, and show nothing at all if `quiet`. Errors pass through."""
    with ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
        elif as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        yield


def show(
    result: Mapping[str, Any],
    line: str,
    quiet: bool,
    only_json: bool = False,
    table: "RenderableType | None" = None,
) -> None:
    """Print the result as JSON, or a table and a line about it, or nothing."""
    if only_json:
        typer.echo(as_json(result))
    elif not quiet:
        if table is not None:
            print_table(table)
        typer.echo(line)


def print_table(table: "RenderableType", err: bool = False) -> None:
    """Print a table to stdout, or with `err` to stderr."""
    from rich.console import Console

    Console(stderr=err).print(table)


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
