"""`zssvd bench`. Imports torch and transformers when it runs, so that a help text appears at once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zssvd_lightning._files import check_file, replacing_file
from zssvd_lightning.app import command
from zssvd_lightning.errors import ConfigError

if TYPE_CHECKING:
    from zssvd_lightning.app.bench.models import Contender
    from zssvd_lightning.app.bench.results import Results
    from zssvd_lightning.app.bench.settings import BenchSettings


def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help="Folders of compressed models, or any model sources.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with. Default: the one that the folders' reports name.")
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Instead of folders: model or config.json whose shape gets random weights."),
    ] = None,
    ratio: Annotated[str | None, typer.Option(help="Prune ratios for --random, such as 0.2,0.4.")] = None,
    storage: Annotated[str | None, typer.Option(help="Storages for --random, such as factors,pivoted.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks for --random; by default all.")] = None,
    batch: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,8,32",
    context: Annotated[
        str | None,
        typer.Option(help="Tokens before the first decode step. Default: 128,2048, as far as the model takes them."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Decode steps in a round.")] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds, in each of which every model has its turn.")] = 5,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no further round of one batch and context after this time.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default the GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run what torch.compile makes of the models.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="JSON file to write.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown table to write.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to write, such as bench.png.")] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Write the speeds of the first batch and context into the folders' reports."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show nothing but errors; exit codes are the same.")
    ] = False,
) -> None:
    """Measure prefill and decode speed of compressed models beside the dense one, and how far each is from its limit.

    All models take turns in one run. The exit code is 1 if a model was not measured at some batch and context.
    """
    with command.streams(quiet):
        import torch

        from zssvd_lightning.app.bench.results import Results
        from zssvd_lightning.app.bench.runner import measure
        from zssvd_lightning.app.bench.settings import BenchSettings, numbers
        from zssvd_lightning.app.run import checked_device

        files = [file for file in (json_file, markdown, picture) if file is not None]
        _check_outputs(files, picture)
        device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu")) or "cpu"
        contexts = None if context is None else numbers("context", context)
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        settings = BenchSettings(
            numbers("batch", batch), contexts, tokens, repeats, seconds, dtype, device, compiled=compiled
        )
        if record:
            from zssvd_lightning.app.bench.record import recorded, refuse_no_reports

            refuse_no_reports(models or [])
        if random is None:
            given = {"ratio": ratio, "storage": storage, "layers": layers}
            if extra := [name for name, value in given.items() if value is not None]:
                raise ConfigError(f"--{extra[0]} is for --random alone; folders are measured as they are")
            found = _from_folders(models or [], dense, settings)
        else:
            if models or dense is not None:
                raise ConfigError("--random takes its shape from one config; give no folders and no --dense with it")
            found = _at_random(random, ratio, storage, layers, settings)
        results = Results(found, settings, *measure(found, settings, progress=not quiet))
        _write(results, json_file, markdown, picture)
        files += recorded(results) if record else []
    if not quiet:
        command.print_table(results.table())
        for file in files:
            typer.echo(f"wrote {file}")
    if any(outcome.error for outcome in results.outcomes):
        raise typer.Exit(1)


def _check_outputs(files: Sequence[Path], picture: Path | None) -> None:
    """Raise OutputError or MissingExtraError if a file could not be written after the measurement."""
    for file in files:
        check_file(file)
    if picture is not None:
        from zssvd_lightning.app.bench.picture import check_drawing

        check_drawing()


def _from_folders(models: Sequence[str], dense: str | None, settings: "BenchSettings") -> "list[Contender]":
    from zssvd_lightning.app.bench.models import from_folders

    if not models:
        raise ConfigError("name one or more folders of compressed models, or --random MODEL for a shape alone")
    return from_folders(models, dense, settings.dtype, settings.device)


def _at_random(
    source: str, ratio: str | None, storage: str | None, layers: int | None, settings: "BenchSettings"
) -> "list[Contender]":
    from zssvd_lightning.app.bench.models import at_random
    from zssvd_lightning.app.bench.settings import fractions

    if ratio is None or storage is None:
        raise ConfigError("--random needs --ratio and --storage, such as --ratio 0.4 --storage pivoted")
    storages = list(dict.fromkeys(storage.split(",")))
    return at_random(source, fractions("ratio", ratio), storages, settings.dtype, settings.device, layers)


def _write(results: "Results", json_file: Path | None, markdown: Path | None, picture: Path | None) -> None:
    if json_file is not None:
        with replacing_file(json_file) as file:
            file.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if markdown is not None:
        with replacing_file(markdown) as file:
            file.write_text(results.markdown(), encoding="utf-8")
    if picture is not None:
        from zssvd_lightning.app.bench.picture import draw

        draw(results.rows(), picture)
