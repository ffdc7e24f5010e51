"""The rules of the layout that the import contract in pyproject.toml cannot state."""

import ast
from pathlib import Path

import pytest

import zssvd_lightning

PACKAGE = Path(zssvd_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted({path.parent for path in FILES})


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lightning_s_trainer_and_collectives_stay_in_their_packages(path):
    names = imported(path)
    if package_of(path) not in {"callbacks", "strategies", "app"}:
        assert not {name for name in names if name == "lightning" or name.startswith("lightning.pytorch")}
    if package_of(path) not in {"distributed", "strategies"}:
        assert "torch.distributed" not in names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_350_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_a_package_has_at_most_twelve_files_beside_its_init(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12


def test_the_docstring_of_the_package_names_every_package():
    names = {folder.name for folder in PACKAGES if folder.parent == PACKAGE}
    assert names <= set(zssvd_lightning.__doc__.split())
