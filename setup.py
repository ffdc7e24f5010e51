"""Description for package indexes: README.md without relative links and pictures, which lead nowhere there.

All other settings are in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")

NOTE = "Pages and files that are named here without a link are in the source distribution.\n\n"


def described(text: str) -> str:
    """Return a text with the paths of relative links beside their titles, a note on them, and no relative pictures."""
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text)
    text = re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#]*)[^)]*\)", r"\1 (`\2`)", text)
    title, rest = text.split("\n\n", 1)
    return f"{title}\n\n{NOTE}{rest}"


if __name__ == "__main__":
    setup(long_description=described(README.read_text(encoding="utf-8")), long_description_content_type="text/markdown")
