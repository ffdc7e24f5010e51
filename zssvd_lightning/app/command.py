"""Common parts of command lines: usage, errors in one line, streams, tables and JSON."""

import copy
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from zssvd_lightning._files import check_output, json_of
from zssvd_lightning.errors import ZSSVDError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from zssvd_lightning.app.run import Run
    from zssvd_lightning.app.run_config import RunConfig
    from zssvd_lightning.serialization.unfinished import UnfinishedFolder

T = TypeVar("T")

logger = logging.getLogger(__name__)


HELP = {"-h", "--help"}


class ToStderr(logging.StreamHandler[Any]):
    """Handler that writes to what `sys.stderr` is at the time of the message."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The current `sys.stderr`."""
        return sys.stderr


def show_own_messages() -> None:
    """Show the messages of this package from level INFO on, and leave other loggers as they are."""
    own = logging.getLogger("zssvd_lightning")
    own.setLevel(logging.INFO)
    if not any(isinstance(handler, ToStderr) for handler in own.handlers):
        own.addHandler(ToStderr())


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


@contextmanager
def ended_by_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit within the block, so that what was begun is undone."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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


@contextmanager
def going_on(config: "RunConfig") -> Iterator["UnfinishedFolder | None"]:
    """Yield the folder beside the output by which a run block by block goes on after an interruption; None for others.

    It is removed if the block succeeds. SIGTERM ends the block as Ctrl-C does.

    Raises:
        OutputError: the output cannot be written, or the folder cannot be used; see `UnfinishedFolder`.
    """
    from zssvd_lightning.serialization.unfinished import UnfinishedFolder

    output = check_output(config.output, config.model.source)
    folder = output.with_name(f"{_first_bytes(output.name)}.unfinished")
    with ExitStack() as stack:
        stack.enter_context(ended_by_exit())
        blocks = config.recovery is None and config.compression.may_be_by_blocks
        if not blocks and folder.exists():
            logger.warning("what is finished in %s is not used; delete it", folder)
        yield stack.enter_context(UnfinishedFolder(folder, "the folder")) if blocks else None


def _first_bytes(name: str) -> str:
    """Return at most 200 bytes of a name, to which file systems let something be added."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def calibrated(run: "Run", function: Callable[..., T], *, shown: bool = True, **arguments: Any) -> T:
    """Return the result of `compress` or `plan` for the model and settings of a run; `shown` prints the coverage."""
    from zssvd_lightning.compression.gathering import loss_in

    if run.progress and shown:
        print_table(run.coverage.table(), err=True)
    calibration = run.config.calibration
    return function(
        run.model,
        run.calibration_loader(),
        run.config.compression,
        calibration_batches=calibration.batches,
        loss=loss_in(calibration.precision_on(run.model.device)),
        progress=run.progress,
        **arguments,
    )


def show_memory(
    source: str,
    overrides: list[str],
    options: dict[str, Any],
    flops: float | None,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print what a compression would take; see `zssvd plan --memory`."""
    with streams(quiet, as_json):
        from zssvd_lightning.app.memory import memory_needs, rate_of, table_of

        rate, origin = rate_of(flops, device)
        rows = memory_needs(source, overrides, options)
    found = [
        row._asdict() | {"needs": row.needs._asdict(), "work": row.work._asdict(), "hours": row.work.hours(rate)}
        for row in rows
    ]
    result = {"bytes": found, "rate": rate, "rate_is": origin}
    show(
        result,
        "the page on multiple devices of the documentation has the formulas",
        quiet,
        as_json,
        table_of(rows, rate, origin),
    )


def show(
    result: Mapping[str, Any],
    line: str,
    quiet: bool,
    only_json: bool = False,
    table: "Table | None" = None,
) -> None:
    """Print the result as JSON, or a table and a line about it, or nothing."""
    if only_json:
        typer.echo(json_of(result))
    elif not quiet:
        if table is not None:
            print_table(table)
        typer.echo(line)


def print_table(table: "Table", err: bool = False) -> None:
    """Print a table to stdout, or with `err` to stderr, without cutting an entry.

    Outside of a terminal, as in a pipe, the table is as wide as its entries. In a terminal that is too narrow for the
    longest word of every column, each row is printed as lines `title: entry`.
    """
    from rich.console import Console

    from zssvd_lightning.compression.report_table import WIDEST

    console = Console(stderr=err)
    needs = console.measure(table, options=console.options.update(width=WIDEST))
    if not console.is_terminal:
        console.width = needs.maximum
    if needs.maximum <= console.width:
        console.print(table)
    elif needs.minimum <= console.width:
        console.print(_without_broken_words(console, table, console.width - needs.minimum))
    else:
        for line in _lines_of(console, table):
            console.print(line, overflow="fold")


def _without_broken_words(console: "Console", table: "Table", spare: int) -> "Table":
    """Return a table of which every column has the width of its longest word, and `spare` is added to the last ones."""
    from rich.measure import Measurement

    table, options = copy.deepcopy(table), console.options
    for column in reversed(table.columns):
        sizes = [Measurement.get(console, options, shown) for shown in (column.header, *column.cells)]
        least, most = max(size.minimum for size in sizes), max(size.maximum for size in sizes)
        column.width = min(most, least + spare)
        spare -= column.width - least
    return table


def _lines_of(console: "Console", table: "Table") -> "Iterator[Text]":
    """Yield the title of a table, each of its rows as lines `title: entry` under its first entry, and the caption."""
    from rich.text import Text

    def plain(shown: Any) -> str:
        return console.render_str(shown).plain if isinstance(shown, str) else str(shown)

    first_title, *titles = [plain(column.header) for column in table.columns]
    if table.title:
        yield Text(plain(table.title), style="italic")
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        yield Text(f"{first_title}: {plain(first)}" if first_title else plain(first), style="bold")
        for title, entry in zip(titles, map(plain, others), strict=True):
            if entry:
                yield Text(f"  {title}: {entry}")
    if table.caption:
        yield Text(plain(table.caption), style="italic")
