"""`zssvd compress`, `plan`, `compare`, `evaluate`, `bench`, `export`, `report`, `phases`, `init` and `keys`.

Commands import torch and transformers when they run, so that a help text appears at once.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from zssvd_lightning._files import check_output, json_of
from zssvd_lightning.app import command
from zssvd_lightning.app import settings as asked
from zssvd_lightning.app.bench.command import bench
from zssvd_lightning.app.options import (
    AsJson,
    Device,
    Dtype,
    MaxHostMemory,
    MaxMemory,
    Memory,
    Overrides,
    Preset,
    Quiet,
    Ratio,
    Source,
    Text,
)
from zssvd_lightning.app.settings import meaning
from zssvd_lightning.config.presets import DEFAULT_TRAINED

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(asked_for: bool) -> None:
    if asked_for:
        from zssvd_lightning import __version__

        typer.echo(f"zssvd-lightning {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress language models by truncated SVD."""
    command.show_own_messages()


@app.command()
def compress(
    source: Source,
    overrides: Overrides = None,
    ratio: Ratio = None,
    preset: Preset = None,
    memory: Memory = None,
    max_memory: MaxMemory = None,
    max_host_memory: MaxHostMemory = None,
    out: Annotated[str | None, typer.Option(help=f"{meaning('output')} Required without a YAML file.")] = None,
    dtype: Dtype = None,
    text: Text = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            help=f"{meaning('evaluation.text')} Default: {asked.TEST_TEXT} beside the default calibration text "
            f"{asked.TRAIN_TEXT}, else none."
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|TIME",
            help="Train the compressed model for so many steps (200) or so long (10min, 90s, 1h). Without settings of "
            f"recovery, those of preset {DEFAULT_TRAINED} apply.",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model: calibrate, truncate, factorize, evaluate, and write model and report.json to a folder.

    Options win over the YAML file. `zssvd keys` lists all settings. With `--recover`, or settings of `recovery`, the
    compressed model is trained, and held-out calibration text chooses its final state.
    """
    options = _options(ratio, preset, dtype, text)
    options |= {"compression.memory": memory, "output": out, "evaluation.text": evaluate}
    options |= {"compression.max_memory": max_memory, "compression.max_host_memory": max_host_memory}
    with command.streams(quiet, as_json):
        settings = asked.read_run(source, overrides or (), options, recover=recover)

        from zssvd_lightning.app.html.page import PAGE
        from zssvd_lightning.app.run import Run
        from zssvd_lightning.compression.pipeline import compress as compress_model
        from zssvd_lightning.compression.pipeline import refuse_beforehand
        from zssvd_lightning.compression.report import REPORT

        with command.going_on(settings) as unfinished:
            run = Run(settings, not quiet, device=device)
            if settings.recovery is None:
                command.calibrated(run, refuse_beforehand, shown=False, resume_in=unfinished)
            run.evaluate("dense")
            if settings.recovery is None:
                report = command.calibrated(run, compress_model, resume_in=unfinished)
                run.evaluate("compressed")
            else:
                from zssvd_lightning.app.recovered import compress_and_train

                report, _ = compress_and_train(run)
            run.save(report)
    line = f"wrote {run.output / REPORT}, with the model and {PAGE} beside it"
    command.show({**report.to_dict(), "output": str(run.output)}, line, quiet, as_json, report.table())


@app.command()
def plan(
    source: Source,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file to write, to be reviewed and given as compression.plan=FILE. Not with --memory.",
        ),
    ] = None,
    overrides: Overrides = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Show what a compression would take on the device, on the host and on disk, from the config of the "
            "model alone, and write nothing.",
        ),
    ] = False,
    ratio: Ratio = None,
    preset: Preset = None,
    dtype: Dtype = None,
    text: Text = None,
    device: Device = None,
    flops: Annotated[
        float | None,
        typer.Option(
            help="Rate of the machine for the hours of --memory, such as 50e12 operations per second. Without, that of "
            "products of float32 matrices is measured on the device."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the rank that compress would choose for every layer, and change nothing.

    With --memory, show the memory and the time that compress would take instead.
    """
    is_setting = file is not None and re.match(r"[\w.]+=", str(file)) is not None
    if memory:
        if file is not None and not is_setting:
            raise typer.BadParameter("--memory writes nothing; leave out the file", param_hint="FILE")
        entries = [*([] if file is None else [str(file)]), *(overrides or ())]
        command.show_memory(source, entries, _options(ratio, preset, dtype, None), flops, device, quiet, as_json)
        return
    if file is None or is_setting:
        raise typer.BadParameter("a file to write is missing, unless --memory is given", param_hint="FILE")
    with command.streams(quiet, as_json):
        import yaml

        from zssvd_lightning.compression.pipeline import plan as plan_ranks
        from zssvd_lightning.selection.plan import check_plan_output

        check_plan_output(file)
        settings = asked.read_run(source, overrides or (), _options(ratio, preset, dtype, text), plans=True)

        from zssvd_lightning.app.run import Run

        run = Run(settings, not quiet, device=device, saves=False)
        command.calibrated(run, plan_ranks).write(file)
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    command.show({**written, "output": str(file)}, f"wrote {file}", quiet, as_json)


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="YAML files of compress, and settings: of the comparison, and those that win over all files.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure several presets at several prune ratios and calibration seeds, and write a table to `output`.

    `zssvd keys compare` lists the settings. Started again, it goes on where it stopped. The exit code is 1 if a cell
    failed.
    """
    with command.streams(quiet):
        from zssvd_lightning.app.compare import compare as compare_presets

        results = compare_presets(arguments or [], progress=not quiet)
    if not quiet:
        command.print_table(results.table())
        typer.echo(f"wrote compare.json and compare.md to {results.comparison.config.output}")
    for name, error in results.errors.items():
        typer.secho(f"{name}: {error}", fg="red", err=True)
    if results.errors:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a run, or any model source.")],
    overrides: Overrides = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Floating-point type of the weights while measuring.")] = "float32",
    as_json: Annotated[
        bool, typer.Option("--json", help="Accepted for uniformity; the result is JSON anyway.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show nothing but the result and errors; exit codes are the same.")
    ] = False,
) -> None:
    """Print perplexity and zero-shot accuracy of a saved model as JSON.

    Text, windows and length are by default those of the run. `zssvd keys evaluate` lists the settings.
    """
    with command.streams(quiet, as_json=True):
        from zssvd_lightning._numerics import DTYPES
        from zssvd_lightning._validation import require_one_of
        from zssvd_lightning.app.run import measure, recorded_evaluation
        from zssvd_lightning.app.run_config import EvaluateConfig
        from zssvd_lightning.config.loading import load_config

        require_one_of("dtype", dtype, DTYPES)
        entries = [override.removeprefix("evaluation.") for override in overrides or ()]  # as compress takes them
        settings = load_config(EvaluateConfig, None, entries, recorded_evaluation(model))
        measured, table = measure(model, settings, dtype=dtype, device=device, progress=not quiet)
        if table is not None:
            command.print_table(table, err=True)
    typer.echo(json_of(measured))


app.command()(bench)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a compressed model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    overrides: Overrides = None,
    dtype: Annotated[str | None, typer.Option(help=meaning("dtype", "ExportConfig"))] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for other tools: dense, self-contained, or as an ONNX graph. See `zssvd keys export`."""
    with command.streams(quiet, as_json):
        from zssvd_lightning.app.run_config import ExportConfig
        from zssvd_lightning.compression.report import read_report
        from zssvd_lightning.config.loading import load_config
        from zssvd_lightning.hub.export import export_dense, export_onnx
        from zssvd_lightning.hub.saving import save_pretrained
        from zssvd_lightning.sources.models import load_model, no_bar_of_weights

        settings = load_config(ExportConfig, None, asked.with_options(overrides or (), {"dtype": dtype}))
        check_output(folder, model)
        loaded, tokenizer = load_model(model, settings.dtype or "auto")
        with no_bar_of_weights():
            if settings.format == "onnx":
                export_onnx(loaded, folder, tokenizer)
            elif settings.format == "dense":
                export_dense(loaded, folder, tokenizer, settings.max_shard_size)
            else:
                report, shard = read_report(Path(model)), settings.max_shard_size
                save_pretrained(loaded, folder, tokenizer, report=report, max_shard_size=shard, self_contained=True)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    command.show({"output": str(folder), "format": settings.format, "files": names}, f"wrote {folder}", quiet, as_json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of compress.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; report.html by default, in the folder if there is only one.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file that shows what a compression did, or compares several."""
    with command.streams(quiet):
        from zssvd_lightning.app.html.page import write_page

        written = write_page(folders, out)
    command.show({}, f"wrote {written}", quiet)


@app.command()
def phases(
    metrics: Annotated[Path, typer.Argument(help="metrics.csv of a CSVLogger.")],
    picture: Annotated[Path, typer.Argument(help="File to write, such as phases.png.")],
    loss: Annotated[str, typer.Option(help="Column with the training loss.")] = "loss",
    quiet: Quiet = False,
) -> None:
    """Draw how a training run went through the phases of its compression."""
    from zssvd_lightning.app.pictures import draw_phases

    with command.streams(quiet):
        draw_phases(metrics, picture, loss)
    command.show({}, f"wrote {picture}", quiet)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="File to write; an existing one is refused.")],
    model: Annotated[str | None, typer.Argument(help=meaning("model.source"))] = None,
    preset: Preset = None,
    ratio: Ratio = None,
    quiet: Quiet = False,
) -> None:
    """Write a YAML file for compress in which every setting stands with its meaning."""
    with command.streams(quiet):
        asked.write_template(file, model, preset, ratio)
    more = "" if model else ", which lacks model.source"
    command.show({}, f"wrote {file}{more}; compress by it with: zssvd compress {file}", quiet)


@app.command()
def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            help="Only these: model, calibration, compression, evaluation, training, ..., a single key, or the keys of "
            f"another command: {', '.join(asked.COMMANDS)}."
        ),
    ] = None,
) -> None:
    """List every setting of compress and plan with type, default and meaning."""
    typer.echo(asked.listing(section))


def main() -> None:
    """Run the command line. Errors of this package are one line on stderr and exit code 1."""
    with command.errors_in_one_line():
        app()


def _options(ratio: float | None, preset: str | None, dtype: str | None, text: str | None) -> dict[str, Any]:
    """Return the options that compress and plan share by the keys they stand for."""
    return {"compression.prune_ratio": ratio, "preset": preset, "model.dtype": dtype, "calibration.text": text}
