"""Arguments and options that several commands take."""

from typing import Annotated

import typer

from zssvd_lightning.app import settings as asked
from zssvd_lightning.app.settings import meaning
from zssvd_lightning.config.presets import PRESETS, TRAINED

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model source (package:NAME, a local folder or a hub id), or a YAML file such as `zssvd init` writes.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings; they win over those of a file.")
]
Ratio = Annotated[float | None, typer.Option(help=meaning("compression.prune_ratio"))]
Preset = Annotated[str | None, typer.Option(help=meaning("preset"), autocompletion=lambda: [*PRESETS, *TRAINED])]
Memory = Annotated[
    str | None, typer.Option(help=meaning("compression.memory"), autocompletion=lambda: ["auto", "whole", "blocks"])
]
MaxMemory = Annotated[str | None, typer.Option(metavar="SIZE", help=meaning("compression.max_memory"))]
MaxHostMemory = Annotated[str | None, typer.Option(metavar="SIZE", help=meaning("compression.max_host_memory"))]
Dtype = Annotated[str | None, typer.Option(help=meaning("model.dtype"))]
Text = Annotated[
    str | None,
    typer.Option(
        help=f"{meaning('calibration.text')} Default: {asked.TRAIN_TEXT} if {asked.CORPUS} is installed, else "
        f"{asked.FALLBACK_TEXT}."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device of the model: cpu, cuda, cuda:1, ...; by default the GPU if there is one.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors; exit codes are the same.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result to stdout as one JSON object.")]
