"""Compare ways to compress a model: `python recipes/compare.py CONFIG... output=FOLDER [key=value ...]`.

Each config is a row of the table at each of `prune_ratios=[0.2,0.4,0.6]`, a mean over `seeds=[0,1,2]`. Stopped and
started again, it goes on with the cells that are missing.
"""

import sys

from rich.console import Console

from zssvd_lightning.compare import Results, compare


def main(*arguments: str) -> Results:
    results = compare(arguments)
    console = Console()
    console.print(results.table())
    for name, error in results.errors.items():
        console.print(f"{name}: {error}", markup=False)
    console.print(f"wrote compare.json and compare.md to {results.comparison.config.output}")
    return results


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]).errors else 0)
