"""Process of one cell; reads its job from standard input."""

import sys

from zssvd_lightning.app.compare.cell import perform, read_job

if __name__ == "__main__":
    perform(read_job(sys.stdin.read()))
