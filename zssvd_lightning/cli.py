"""`zssvd compress`, `plan`, `evaluate` and `phases`."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zssvd_lightning import evaluation, texts
from zssvd_lightning.config import EvaluationConfig, RunConfig, load_config
from zssvd_lightning.errors import ConfigError, ZSSVDError
from zssvd_lightning.files import MARKER
from zssvd_lightning.models import load_model, place
from zssvd_lightning.picture import draw_phases
from zssvd_lightning.pipeline import compress as compress_model
from zssvd_lightning.pipeline import plan as plan_ranks
from zssvd_lightning.plan import check_plan_output
from zssvd_lightning.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]


@app.callback()
def _main() -> None:
    """Compress language models by zero-sum SVD truncation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@app.command()
def compress(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")], overrides: Overrides = None
) -> None:
    """Compress a model: calibrate, truncate, factorise, evaluate, and write model and report.json to `output`."""
    run = Run(load_config(RunConfig, config, overrides or ()))
    run.evaluate("dense")
    report = compress_model(run.model, run.calibration_loader(), run.config.compression)
    run.evaluate("compressed")
    run.save(report)
    Console().print(report.table())
    typer.echo(f"wrote {run.output / MARKER} and the model beside it")


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
    plan_ranks(run.model, run.calibration_loader(), run.config.compression).write(file)
    typer.echo(f"wrote {file}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a run, or any model source.")],
    overrides: Overrides = None,
) -> None:
    """Perplexity of a saved model as JSON. Keys: text, windows, length; for a folder of a run, its own by default."""
    settings = load_config(EvaluationConfig, None, _stripped(overrides or []), _recorded(model))
    if settings.text is None:
        raise ConfigError(f"{model} records no evaluation text; give one as text=SOURCE")
    loaded, tokenizer = load_model(model)
    place(loaded)
    tokens = texts.tokenize(texts.load_text(settings.text), tokenizer)
    windows = texts.windows(tokens, settings.length, settings.windows, settings.text)
    typer.echo(json.dumps(evaluation.perplexity(loaded, windows)._asdict()))


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


def _recorded(model: str) -> dict[str, Any]:
    """The evaluation settings in the report of a run's folder."""
    path = Path(model) / MARKER
    if not path.is_file():
        return {}
    recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("config", {}).get("evaluation", {})
    return recorded
