"""Links between notebooks and pages lead somewhere, and names of the package in prose exist."""

import importlib
import json
import posixpath
import re

import pytest

import sync

PAGES = sorted(path for path in sync.project_files() if path.endswith((".ipynb", ".md")))
LIBRARY = sorted(path for path in sync.project_files() if path.startswith("sptseg/") and path.endswith(".py"))
NAME = re.compile(r"\bsptseg((?:\.[A-Za-z_]\w*)+)")


def prose(path):
    """The Markdown of a notebook or page, fenced code left out."""
    content = (sync.ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        cells = [cell["source"] for cell in json.loads(content)["cells"] if cell["cell_type"] == "markdown"]
        content = "\n\n".join("".join(source) for source in cells)
    return re.sub(r"^```.*?^```", "", content, flags=re.M | re.S)


def anchors(path):
    """Ids of the headings of a notebook or page: Jupyter's spelling (case kept) and GitHub's."""
    titles = re.findall(r"^#+ +(.*)", prose(path), re.M)
    github = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
    return {*(title.replace(" ", "-") for title in titles), *github}


def resolves(dotted):
    """Whether sptseg.a.b.c is a module or an attribute that can be reached from one."""
    parts = ["sptseg", *dotted.strip(".").split(".")]
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    broken = []
    for _, target in sync.LINK.findall(prose(path)):
        file, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
        if not (sync.ROOT / file).exists() or anchor and anchor not in anchors(file):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", [*PAGES, *LIBRARY])
def test_names_of_the_package_exist(path):
    content = (sync.ROOT / path).read_text(encoding="utf-8")
    text = prose(path) if path in PAGES else "\n".join(re.findall(r'"""[\s\S]*?"""|#.*', content))
    assert [name for name in NAME.findall(text) if not resolves(name)] == []


@pytest.mark.parametrize("path", LIBRARY)
def test_notebooks_named_in_the_library_exist(path):
    text = (sync.ROOT / path).read_text(encoding="utf-8")
    books = {posixpath.basename(name) for name in sync.project_files() if name.endswith(".ipynb")}
    assert {name for name in re.findall(r"[\w.]+\.ipynb", text)} - books == set()
