"""Hooks of the documentation site: links to files of the repository become pages, and TeX becomes MathML.

Pages link to source files as they would in a checkout (`../recipes/train.py`). The site shows each of these files on a
page of its own, so that every link works without a network.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that have pages in the docs."""

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}
OUT_OF_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"


def prose(markdown):
    """Return the text without its blocks of code."""
    return CODE.sub("", markdown)


def in_repository(link, folder):
    """Return the path from the root of the repository of a link in a page; None if there is no such file."""
    path = posixpath.normpath(posixpath.join(folder, link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def page_of(path, docs):
    """Return the page of the site, from its root, that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    inside = path.removeprefix("docs/")
    return inside if inside != path and inside in docs else f"source/{path}.md"


def relinked(markdown, folder, page, docs):
    """Return the text of a page with links to pages of the site.

    Args:
        markdown: text of the page.
        folder: folder of the repository from which its links start.
        page: path of the page in the site.
        docs: paths of all files of the docs.
    """

    def link(match):
        path = in_repository(match[1], folder)
        if path is None:
            return match[0]
        to = posixpath.relpath(page_of(path, docs), posixpath.dirname(page) or ".")
        return f"]({to}{match[2] or ''})"

    parts, at = [], 0
    for block in CODE.finditer(markdown):
        parts += [LINK.sub(link, markdown[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*parts, LINK.sub(link, markdown[at:])])


def shown(path, docs):
    """Return the page that shows a file or a folder of the repository."""
    file, page = ROOT / path, f"source/{path}.md"
    if path.endswith(".md"):
        return OUT_OF_SEARCH + relinked(file.read_text(encoding="utf-8"), posixpath.dirname(path), page, docs)
    if file.is_dir():
        text = relinked("".join(f"- [{child}]({path}/{child})\n" for child in children(path)), "", page, docs)
    else:
        text = f"``````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}``````\n"
    return f"{OUT_OF_SEARCH}# `{path}`\n\n{text}"


def children(path):
    """Return the names of the files in a folder of the repository."""
    return sorted(child.name for child in (ROOT / path).iterdir() if child.is_file())


def on_files(files, config):
    """Add a page for every file of the repository that a page links to, also from these pages."""
    from mkdocs.structure.files import File, InclusionLevel

    docs = {file.src_uri for file in files}
    texts = [
        (file.content_string, posixpath.join("docs", posixpath.dirname(file.src_uri)))
        for file in files.documentation_pages()
    ]
    done = set()
    while texts:
        text, folder = texts.pop()
        for match in LINK.finditer(prose(text)):
            path = in_repository(match[1], folder)
            if path is None or path in done or not page_of(path, docs).startswith("source/"):
                continue
            done.add(path)
            if path.endswith(".md"):
                texts.append(((ROOT / path).read_text(encoding="utf-8"), posixpath.dirname(path)))
            elif (ROOT / path).is_dir():
                texts.append(("".join(f"]({child})" for child in children(path)), path))
            page = f"source/{path}.md"
            files.append(File.generated(config, page, content=shown(path, docs), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let the links of a page lead to pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return relinked(markdown, folder, page.file.src_uri, {file.src_uri for file in files})


def on_page_content(html, page, config, files):
    """Write equations in MathML, and the pipes that Markdown escapes in tables as they are."""
    from latex2mathml.converter import convert

    def math(match):
        tex = match[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(tex[2:-2], display="block" if match[1] == "div" else "inline")

    html = re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', math, html, flags=re.DOTALL)
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("\\|", "|"), html)
