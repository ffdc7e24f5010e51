"""The documentation site lists every page, error, preset and public name. `make docs` builds it, strictly."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import zssvd_lightning
from zssvd_lightning import errors
from zssvd_lightning.config.presets import PRESETS, TRAINED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(nav):
    for entry in nav:
        for value in entry.values():
            yield from entries(value) if isinstance(value, list) else [value]


def headings(text):
    """Anchors of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)).strip().lower() for title in titles]
    return {re.sub(r"\s+", "-", title) for title in plain}


def test_the_navigation_is_the_pages_there_are():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(entries(config["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == PAGES


def test_nothing_is_fetched_from_elsewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript"} & config.keys()
    assert all((DOCS / path).is_file() for path in config["extra"]["polyfills"] + config["extra_css"])
    for path in (DOCS / "assets").iterdir():
        assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(\s*[\"']?https?:|@import", path.read_text()), path


@pytest.mark.parametrize("page", sorted(PAGES))
def test_anchors_are_those_of_headings(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", (DOCS / page).read_text()):
        target = (DOCS / page).parent / link if link else DOCS / page
        if not anchor.startswith("zssvd_lightning."):  # made by mkdocstrings
            assert anchor in headings(target.read_text()), f"{link}#{anchor}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_leads_to_a_page_of_the_site(page):
    hooks = loaded("hooks")
    folder = (Path("docs") / page).parent.as_posix()
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*")}
    text = hooks.relinked((DOCS / page).read_text(), folder, page, files)
    for link, _ in hooks.LINK.findall(hooks.prose(text)):
        to = ((DOCS / page).parent / link).resolve().relative_to(DOCS).as_posix()
        assert to in files or (to.startswith("source/") and (ROOT / to[len("source/") : -len(".md")]).exists()), link


def test_links_to_files_of_the_repository_become_links_to_pages():
    hooks = loaded("hooks")
    docs = {"index.md", "a.md", "b/c.md"}
    code = "```\n[x](../README.md)\n```"
    elsewhere = "[w](https://example.org) [v](#anchor) [u](no_such_file.py)"
    text = f"[x](../zssvd_lightning/errors.py#L1) [y](../README.md)\n{code}\n{elsewhere}"
    expected = f"[x](source/zssvd_lightning/errors.py.md#L1) [y](index.md)\n{code}\n{elsewhere}"
    assert hooks.relinked(text, "docs", "a.md", docs) == expected
    assert hooks.relinked("[r](../../recipes)", "docs/b", "b/c.md", docs) == "[r](../source/recipes.md)"
    assert "[train.py](recipes/train.py.md)" in hooks.shown("recipes", docs)


def test_every_error_and_warning_has_an_entry():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    page = (DOCS / "troubleshooting.md").read_text()
    titles, texts = zip(*re.findall(r"^##+ (.*)\n\n((?:(?!^#).*\n)*)", page, re.MULTILINE), strict=True)
    found = {title: text for title, text in zip(titles, texts, strict=True) if title.endswith(("Error", "Warning"))}
    assert found.keys() == classes
    for name in classes - {"ZSSVDError"}:
        assert "**Do:**" in found[name] or "| do |" in found[name], name


def test_every_public_name_is_on_the_page_of_names():
    page = (DOCS / "api.md").read_text()
    listed = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    named = [f"{zssvd_lightning.__name__}.{module}.{name}" for name, module in zssvd_lightning._MODULES.items()]
    linked = re.findall(r"configuration\.md#(\S+?)\)", page)
    assert sorted(listed + linked) == sorted(named)
    settings = re.findall(r"^::: (\S+)$", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    assert set(linked) <= set(settings)
    for path in [*listed, *settings]:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_every_preset_is_on_the_page_of_presets():
    page = (DOCS / "presets.md").read_text()
    assert sorted(re.findall(r"^## `(\S+)`$", page, re.MULTILINE)) == sorted([*PRESETS, *TRAINED])
    for path in re.findall(r'^--8<-- "(\S+)"$', page, re.MULTILINE):
        assert (ROOT / path).is_file()


def test_pictures_are_those_that_the_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = {path.name for path in loaded("pictures").draw(tmp_path, steps=1)}
    assert drawn == {path.name for path in (DOCS / "assets").glob("*.svg")}
    used = re.findall(r"\(assets/(\w+\.svg)\)", (DOCS / "how_it_works.md").read_text())
    assert sorted(used) == sorted(drawn)
    assert all((tmp_path / name).read_text().lstrip().startswith("<?xml") for name in drawn)
