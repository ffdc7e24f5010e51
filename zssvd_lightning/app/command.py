"""Common parts of command lines: usage, and errors in one line."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from zssvd_lightning.errors import ZSSVDError

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
