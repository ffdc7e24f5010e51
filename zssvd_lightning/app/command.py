"""Common parts of command lines: usage, errors in one line, calibration, and JSON."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from zssvd_lightning.errors import ZSSVDError

if TYPE_CHECKING:
    from zssvd_lightning.app.run import Run

logger = logging.getLogger(__name__)


T = TypeVar("T")


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


def calibrated(run: "Run", function: Callable[..., T]) -> T:
    """Return the result of `compress` or `plan` for the model and settings of a run."""
    from zssvd_lightning.compression.gathering import loss_in

    if run.progress:
        from rich.console import Console

        Console(stderr=True).print(run.coverage.table())
    calibration = run.config.calibration
    return function(
        run.model,
        run.calibration_loader(),
        run.config.compression,
        calibration_batches=calibration.batches,
        loss=loss_in(calibration.precision),
        progress=run.progress,
    )


def as_json(result: Mapping[str, Any]) -> str:
    """Return a result as one JSON object. JSON has no NaN and no infinity, so they become null, with a warning."""
    lost: list[str] = []
    text = json.dumps(_finite(result, "", lost), allow_nan=False)
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
