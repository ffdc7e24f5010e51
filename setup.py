"""Description for package indexes: README.md without relative links and pictures, which lead nowhere there.

They become absolute if `[project.urls]` in pyproject.toml has a `Repository`. Without one, links become plain text, and
pictures are left out. All other settings are in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

NOTE = "Pages and files that are named here without a link are in the source distribution.\n\n"


RELATIVE = r"\((?![a-z]+:|#)([^)]+)\)"


def described(text: str, repository: str | None = None) -> str:
    """Return a text as package indexes can show it.

    Args:
        text: Markdown with relative links and pictures.
        repository: address of the repository, to which they then lead. None to replace links by titles with the paths
            beside them, with a note on that, and to leave pictures out.
    """
    if repository is not None:
        address = repository.removesuffix("/").removesuffix(".git")
        text = re.sub(rf"(!\[[^\]]*\]){RELATIVE}", rf"\1({address}/raw/HEAD/\2)", text)
        return re.sub(rf"(\[[^\]]*\]){RELATIVE}", rf"\1({address}/blob/HEAD/\2)", text)
    text = re.sub(rf"!\[[^\]]*\]{RELATIVE}\n+", "", text)
    text = re.sub(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#]*)[^)]*\)", r"\1 (`\2`)", text)
    title, rest = text.split("\n\n", 1)
    return f"{title}\n\n{NOTE}{rest}"


def long_description() -> str:
    """Return README.md as package indexes can show it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    return described((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository"))


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
