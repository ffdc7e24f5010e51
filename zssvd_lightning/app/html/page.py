"""Write the page of one run or several."""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from zssvd_lightning._files import checked_path, list_in_manifest, replacing_file
from zssvd_lightning.app.html import facts as numbers
from zssvd_lightning.app.html.comparison import comparison, letter
from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.app.html.figures import choice, course
from zssvd_lightning.app.html.markup import Markup, element, joined
from zssvd_lightning.app.html.ranks import ranks
from zssvd_lightning.app.html.sections import continuations, costs, coverage, settings
from zssvd_lightning.compression.report import REPORT, read_report
from zssvd_lightning.errors import OutputError, SavedModelError

PAGE = "report.html"
"""File beside `report.json`."""


MARK = '<meta name="generator" content="zssvd-lightning">'
"""Start of a page of this package, by which it is told from other files, which are not overwritten."""


def page(runs: Sequence[Facts]) -> str:
    """Return the page of one run or several as HTML. It links to nothing outside of itself."""
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} compressed models"
    if len(runs) == 1:
        body: list[str] = [element("h1", title), _introduction(runs[0]), *_sections(runs[0], 0)]
    else:
        body = [element("h1", title), comparison(runs, "comparison")]
        for index, run in enumerate(runs):
            summary = element("summary", element("h2", f"{letter(index)} {run.folder}: {run.title}"))
            body.append(
                element("details", summary, _introduction(run), *_sections(run, index), class_="run", id=f"run-{index}")
            )
    source = files("zssvd_lightning.app.html")
    parts = {
        "title": element("title", title),
        "mark": MARK,
        "style": source.joinpath("page.css").read_text(encoding="utf-8"),
        "script": source.joinpath("page.js").read_text(encoding="utf-8"),
        "body": joined(body),
        "footer": f"zssvd-lightning {version('zssvd-lightning')}",
    }
    text = source.joinpath("page.html").read_text(encoding="utf-8")
    pieces = text.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name.strip()], rest]
    return "".join(filled)


def _introduction(run: Facts) -> Markup:
    """Return a line with the texts and the folder of a run."""
    on = f", measured on {run.text()}" if run.text() else ""
    return element("p", f"Calibrated on {run.calibration}{on}. Folder: {run.folder}.", class_="about")


def _sections(run: Facts, index: int) -> list[Markup]:
    made = {
        "numbers": numbers.headline,
        "coverage": coverage,
        "ranks": ranks,
        "choice": choice,
        "course": course,
        "costs": costs,
        "continuations": continuations,
        "settings": settings,
    }
    found = (make(run, f"{name}-{index}") for name, make in made.items())
    return [part for part in found if part is not None]


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the reports in folders, and return its path.

    Args:
        folders: folders with a `report.json`.
        out: file to write; `report.html` in the folder, or in the working directory for several folders, when None.

    Raises:
        SavedModelError: a folder has no report, or an unreadable one.
        OutputError: the file exists and was not written by this function, or cannot be written.
    """
    runs = [_facts(checked_path(folder, SavedModelError, "folder")) for folder in folders]
    if out is None:
        out = (folders[0].expanduser() if len(folders) == 1 else Path()) / PAGE
    out = checked_path(out, OutputError)
    if out.exists() and not _is_page(out):
        raise OutputError(f"{out} exists and is no page of this command; name another file with --out")
    with replacing_file(out) as file:
        file.write_text(page(runs), encoding="utf-8")
    list_in_manifest(out)
    return out


def _is_page(path: Path) -> bool:
    try:
        return MARK in path.read_text(encoding="utf-8", errors="replace")[:500]
    except OSError:  # a folder, or not ours to read
        return False


def _facts(folder: Path) -> Facts:
    report = read_report(folder)
    if report is None:
        raise SavedModelError(f"{folder} has no {REPORT}; name the output folder of zssvd compress")
    return Facts(report, folder.resolve().name)
