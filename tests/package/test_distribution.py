"""What a wheel and a source distribution contain, as far as the settings of the build say."""

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PYPROJECT["tool"]["setuptools"]


def test_every_config_and_recipe_is_in_the_wheel():
    places = SETTINGS["data-files"]
    installed = {file for patterns in places.values() for pattern in patterns for file in ROOT.glob(pattern)}
    assert installed == {*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "recipes").glob("*.py")}
    for place, patterns in places.items():
        for pattern in patterns:
            assert Path(place).relative_to("share/zssvd-lightning") == Path(pattern).parent


def test_every_file_of_the_package_that_is_no_code_is_in_the_wheel():
    package = ROOT / "zssvd_lightning"
    told = {file for pattern in SETTINGS["package-data"]["zssvd_lightning"] for file in package.glob(pattern)}
    files = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in told if file.suffix != ".py"} == {file for file in files if file.suffix != ".py"}


def setup_of_the_package():
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_package_indexes_get_a_readme_without_relative_links():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = setup_of_the_package().described(readme)
    assert not re.findall(r"\]\((?!https?:)", text)
    assert re.findall(r"\]\(https?:[^)]*\)", text) == re.findall(r"\]\(https?:[^)]*\)", readme)
    assert "Results (`docs/results.md`)" in text
    assert "![" not in text


def test_links_lead_to_the_repository_if_it_has_an_address(tmp_path, monkeypatch):
    module, readme = setup_of_the_package(), (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert module.long_description() == module.described(readme, PYPROJECT["project"]["urls"].get("Repository"))
    address = "https://example.org/someone/zssvd"
    settings = settings.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}.git"\n')
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    text = module.long_description()
    relative = re.findall(r"(!?)\[[^\]]*\]\((?!https?:|#)([^)#]*)[^)]*\)", readme)
    assert relative
    for picture, path in relative:
        assert f"]({address}/{'raw' if picture else 'blob'}/HEAD/{path}" in text
        assert (ROOT / path).exists()
    assert not re.findall(r"\]\((?!https?:|#)", text)
    assert re.sub(rf"{re.escape(address)}/(raw|blob)/HEAD/", "", text) == readme
