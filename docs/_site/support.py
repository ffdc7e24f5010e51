"""Write the table of model classes into `support.md`: `python docs/_site/support.py`.

`MATRIX` says what is expected of every cell. The tests in `tests/integration/test_support_matrix.py` run each cell and
compare, and demand that the page is the one that this file writes.
"""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "support.md"
BEGIN, END = "<!-- table of model classes: docs/_site/support.py -->", "<!-- end of the table -->"

MODELS = ("Llama", "GPT-2", "Gemma 3", "Qwen3-MoE", "BERT", "T5", "ViT", "convolutional network")
"""Rows."""

USES = ("compress", "save, load", "generate", "merge", "ONNX", "resume", "DDP", "FSDP2", "Trainer", "vLLM")
"""Columns."""


class Refused(NamedTuple):
    """A use that is refused by name."""

    error: str
    """Name of the error in `zssvd_lightning.errors`."""
    words: str
    """Regular expression that its message contains."""


class Missing(NamedTuple):
    """A use that a model does not have, compressed or not."""

    why: str


class Untested(NamedTuple):
    """A use that no test runs."""


Cell = Refused | Missing | Untested | None
"""None for a use that works."""

NOT_TRANSFORMERS = Refused("SavedModelError", "is no model of transformers")
NO_TEXT = Missing("writes no text")

MATRIX: dict[tuple[str, str], Cell] = {(model, use): None for model in MODELS for use in USES} | {
    **{(model, "generate"): NO_TEXT for model in ("BERT", "ViT", "convolutional network")},
    **{(model, "vLLM"): Untested() for model in MODELS if model not in {"Llama", "GPT-2"}},
    ("convolutional network", "save, load"): NOT_TRANSFORMERS,
    **{
        (model, "ONNX"): Refused("ExportError", f"torch cannot export {kind}")
        for model, kind in (("Qwen3-MoE", "Qwen3MoeForCausalLM"), ("T5", "T5ForConditionalGeneration"))
    },
    ("Qwen3-MoE", "FSDP2"): Refused("UnsupportedTrainingError", "experts"),
    ("convolutional network", "FSDP2"): Refused("UnsupportedTrainingError", "convolution"),
}
"""Expectation of every cell, by row and column."""


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| | " + " | ".join(USES) + " |", "|---" * (len(USES) + 1) + "|"]
    lines += [f"| {model} | " + " | ".join(_shown(MATRIX[model, use], use) for use in USES) + " |" for model in MODELS]
    return "\n".join(lines)


def written(page: str) -> str:
    """Return a page with the table between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE.name} has no marks {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", page)


def _shown(cell: Cell, use: str) -> str:
    if isinstance(cell, Refused):
        return f"[refused](troubleshooting.md#{cell.error.lower()})"
    if isinstance(cell, Missing):
        return cell.why
    if isinstance(cell, Untested):
        return "not tested"
    return "tested where installed" if use == "vLLM" else "tested"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
