"""`zssvd compress`, `plan`, `compare`, `evaluate`, `export` and `phases`."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._files import check_output
from zssvd_lightning.app.compare import compare as compare_presets
from zssvd_lightning.app.pictures import draw_phases
from zssvd_lightning.app.run import Run
from zssvd_lightning.app.run_config import EvaluateConfig, ExportConfig, RunConfig
from zssvd_lightning.compression.pipeline import compress as compress_model
from zssvd_lightning.compression.pipeline import loss_in
from zssvd_lightning.compression.pipeline import plan as plan_ranks
from zssvd_lightning.compression.report import REPORT, Stopwatch, read_report
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.errors import ConfigError, ModelSourceError, ZSSVDError
from zssvd_lightning.evaluation import perplexity as evaluation
from zssvd_lightning.evaluation import zero_shot
from zssvd_lightning.hub.export import export_dense, export_onnx
from zssvd_lightning.hub.saving import save_pretrained
from zssvd_lightning.selection.plan import check_plan_output
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model, place

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]


T = TypeVar("T")


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@app.callback()
def _main() -> None:
    """Compress language models by zero-sum SVD truncation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@app.command()
def compress(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")], overrides: Overrides = None
) -> None:
    """Compress a model: calibrate, truncate, factorize, evaluate, and write model and report.json to `output`."""
    settings = load_config(RunConfig, config, overrides or ())
    if settings.recovery is not None:
        raise ConfigError(
            "recovery trains the factors, for which a Trainer is needed: run recipes/compress_then_finetune.py with "
            "this file, or leave it out with recovery=null"
        )
    run = Run(settings)
    run.evaluate("dense")
    report = _calibrated(run, compress_model)
    run.evaluate("compressed")
    run.save(report)
    Console().print(report.table())
    typer.echo(f"wrote {run.output / REPORT} and the model beside it")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    file: Annotated[
        Path, typer.Argument(help="YAML file to write, to be reviewed and given as compression.plan=FILE.")
    ],
    overrides: Overrides = None,
) -> None:
    """Write the rank that compress would choose for every layer, and change nothing."""
    check_plan_output(file)
    run = Run(load_config(RunConfig, config, overrides or ()))
    _calibrated(run, plan_ranks).write(file)
    typer.echo(f"wrote {file}")


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="YAML files of compress, and settings: of the comparison, and those that win over all files.",
        ),
    ] = None,
) -> None:
    """Measure several presets at several prune ratios and calibration seeds, and write a table to `output`.

    Keys: output, prune_ratios, seeds, tasks, data, include, limit, batch_size, share_calibration, keep. Started again,
    it goes on where it stopped. The exit code is 1 when a cell failed.
    """
    results = compare_presets(arguments or [])
    Console().print(results.table())
    typer.echo(f"wrote compare.json and compare.md to {results.comparison.config.output}")
    for name, error in results.errors.items():
        typer.secho(f"{name}: {error}", fg="red", err=True)
    if results.errors:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a run, or any model source.")],
    overrides: Overrides = None,
) -> None:
    """Perplexity and zero-shot accuracy of a saved model as JSON.

    Keys: text, windows, length, by default those of the run; tasks, data, include, limit, batch_size, dense.
    """
    settings = load_config(EvaluateConfig, None, _stripped(overrides or []), _recorded(model))
    if settings.text is None and not settings.tasks:
        raise ConfigError(f"{model} records no evaluation text; give one as text=SOURCE, or tasks as tasks=[piqa]")
    dense = settings.dense if settings.tasks else None
    tasks = zero_shot.load_tasks(settings.tasks, settings.data, settings.include) if settings.tasks else None
    sources = {"model": model} if dense is None else {"dense": dense, "compressed": model}
    models = {which: _loaded(which, source) for which, source in sources.items()}
    measured: dict[str, Any] = {}
    if settings.text is not None:
        measured |= _perplexity(*next(reversed(models.values())), settings, settings.text)
    if tasks is not None:
        measured |= {"models": sources, **_accuracy(models, tasks, settings)}
    typer.echo(json.dumps(measured))


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a compressed model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    overrides: Overrides = None,
) -> None:
    """Write a model for other tools. Keys: format (dense, self_contained, onnx), dtype, max_shard_size."""
    settings = load_config(ExportConfig, None, overrides or ())
    check_output(folder, model)
    loaded, tokenizer = load_model(model, settings.dtype or "auto")
    if settings.format == "onnx":
        export_onnx(loaded, folder, tokenizer)
    elif settings.format == "dense":
        export_dense(loaded, folder, tokenizer, settings.max_shard_size)
    else:
        report, shard = read_report(Path(model)), settings.max_shard_size
        save_pretrained(loaded, folder, tokenizer, report=report, max_shard_size=shard, self_contained=True)
    typer.echo(f"wrote {folder}")


@app.command()
def phases(
    metrics: Annotated[Path, typer.Argument(help="metrics.csv of a CSVLogger.")],
    picture: Annotated[Path, typer.Argument(help="File to write, such as phases.png.")],
    loss: Annotated[str, typer.Option(help="Column with the training loss.")] = "loss",
) -> None:
    """Draw how a training run went through the phases of its compression."""
    draw_phases(metrics, picture, loss)
    typer.echo(f"wrote {picture}")


def main() -> None:
    """Entry point: errors of this package are one line on stderr and exit code 1."""
    try:
        app()
    except ZSSVDError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        raise SystemExit(1) from error


def _stripped(overrides: list[str]) -> list[str]:
    """`evaluation.text=...`, as `compress` takes it, means `text=...` here."""
    return [override.removeprefix("evaluation.") for override in overrides]


def _calibrated(run: Run, function: Callable[..., T]) -> T:
    """What `compress` or `plan` makes of the model of a run, by its settings."""
    calibration = run.config.calibration
    return function(
        run.model,
        run.calibration_loader(),
        run.config.compression,
        calibration_batches=calibration.batches,
        loss=loss_in(calibration.precision),
    )


def _loaded(which: str, source: str) -> Loaded:
    try:
        return load_model(source)
    except ModelSourceError as error:
        if which != "dense":
            raise
        raise ModelSourceError(f"dense: {error}; name it as dense=SOURCE, or leave it out with dense=null") from error


def _perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvaluateConfig, text: str
) -> dict[str, Any]:
    place(model)
    tokens = texts.tokenize(texts.load_text(text), tokenizer)
    windows = texts.windows(tokens, settings.length, settings.windows, text)
    return evaluation.perplexity(model, windows)._asdict()


def _accuracy(models: dict[str, Loaded], tasks: zero_shot.Tasks, settings: EvaluateConfig) -> dict[str, Any]:
    """Measures every model on the tasks, from the last, and lets go of it, so that the accelerator holds one."""
    scores: dict[str, zero_shot.Scores] = {}
    watch = Stopwatch()
    while models:
        which, (model, tokenizer) = models.popitem()
        typer.echo(f"{', '.join(settings.tasks)}: {which}", err=True)
        place(model)
        with watch(which):
            scores[which] = zero_shot.accuracy(model, tokenizer, tasks, settings.batch_size, settings.limit)
    compared = zero_shot.side_by_side(dict(reversed(scores.items())))
    Console(stderr=True).print(zero_shot.table(compared))
    return {"tasks": compared, "task_seconds": watch.seconds}


def _recorded(model: str) -> dict[str, Any]:
    """The evaluation settings in the report of a run's folder, and the model it compressed as `dense`."""
    path = Path(model) / REPORT
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8")).get("config", {})
    return {**config.get("evaluation", {}), "dense": config.get("model", {}).get("source")}
