"""Compare ways to compress a model: `python -m recipes.compare CONFIG... output=FOLDER [key=value ...]`.

Each config is a row of the table at each of `prune_ratios=[0.2,0.4,0.6]`, a mean over `seeds=[0,1,2]`. Stopped and
started again, it goes on with the cells that are missing. It is `zssvd compare`; from Python,
`zssvd_lightning.compare.compare` does the same and returns the results.
"""

import sys

from zssvd_lightning.app import cli
from zssvd_lightning.app.command import start


def main(*arguments: str) -> None:
    sys.argv[1:] = ["compare", *arguments]
    cli.main()


if __name__ == "__main__":
    start(main, __doc__)
