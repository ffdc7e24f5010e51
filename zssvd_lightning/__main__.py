"""`python -m zssvd_lightning`, the same as `zssvd`."""

from zssvd_lightning.app.cli import main

if __name__ == "__main__":
    main()
