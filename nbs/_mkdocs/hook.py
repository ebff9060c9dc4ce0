"""Pages of the documentation site: README.md, the notebooks and the files that they link to.

MkDocs calls the functions whose names begin with `on_` (see mkdocs.yml).
"""

import html
import posixpath
import re
import unicodedata
from itertools import groupby
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = re.compile(r"#\|\s*(hide\b|default_exp\b[^\n]*\s*\Z)")
DIRECTIVES = re.compile(r"\A(#\|[^\n]*\n+)+")
WIDGET = "application/vnd.jupyter.widget-view+json"
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LINK = re.compile(r'(\]\(|src="|href=")(?!/|#|[a-z]+:)([^)#"\s]+)')
ANCHOR = re.compile(r"(\]\((?:[^)#\s:]*\.md)?#)([^)\s]+)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
VARIANT = re.compile(r'<(m[in]) mathvariant="(bold|script|double-struck|fraktur)">([^<]+)</\1>')


def notebooks(root: Path = ROOT) -> list[Path]:
    """Notebooks that get a page, in reading order: by folder, numbered ones first."""
    found = [path.relative_to(root) for path in root.glob("nbs/**/*.ipynb")]
    shown = [path for path in found if not any(part[0] in "._" for part in path.parts) and path.name != "index.ipynb"]
    return sorted(shown, key=lambda path: (len(path.parts), path.parent, not path.name[0].isdigit(), path.name))


def section(notebook: Path) -> str:
    """Heading of a notebook in the navigation: its folder under nbs or in its dotted name, if any."""
    if notebook.parent.name != "nbs":
        return notebook.parent.name.capitalize()
    return notebook.stem.partition("_")[2].rpartition(".")[0].replace(".", " / ").capitalize()


def navigation(paths: list[Path], others: list[str]) -> list:
    """README, the notebooks under their headings, then the other pages."""
    nav: list = ["README.md"]
    for heading, group in groupby(paths, section):
        pages = [path.with_suffix(".md").as_posix() for path in group]
        nav += [{heading: pages}] if heading else pages
    return [*nav, {"Project": others}] if others else nav


def page_path(path: str) -> str:
    """Where the site has a file of the checkout."""
    if path == "nbs/index.ipynb":
        return "README.md"
    return path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path


def relink(markdown: str, source: str) -> tuple[str, set[str]]:
    """Make links to notebooks links to pages, with the anchors of MkDocs; also returns the files linked to."""
    linked, folder = set(), posixpath.dirname(source)

    def replace(match):
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / target).is_file():
            return match[0]
        linked.add(target)
        return match[1] + posixpath.relpath(page_path(target), folder or ".")

    pieces = FENCE.split(markdown)
    pieces[::2] = [ANCHOR.sub(lambda m: m[1] + slugify(m[2], "-"), LINK.sub(replace, piece)) for piece in pieces[::2]]
    return "".join(pieces), linked


def tidy(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A code cell without nbdev's directives and without widgets, which need a running kernel."""
    if cell.cell_type == "code":
        cell.source = DIRECTIVES.sub("", cell.source)
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return cell


def render_notebook(path: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, without its hidden cells, and its images by name."""
    notebook = nbformat.read(ROOT / path, as_version=4)
    notebook.metadata.language_info = {"name": "python"}
    notebook.cells = [tidy(cell) for cell in notebook.cells if not HIDDEN.match(cell.source)]
    name = Path(path).stem
    resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    return text, resources["outputs"]


def page(source: str, config: MkDocsConfig) -> tuple[list[File], set[str]]:
    """The page made from a notebook or a Markdown file with its images, and the files that it links to."""
    if source.endswith(".ipynb"):
        text, images = render_notebook(source)
    else:
        text, images = (ROOT / source).read_text(encoding="utf-8"), {}
    text, linked = relink(text, source)
    folder = posixpath.dirname(source)
    files = [File.generated(config, posixpath.join(folder, name), content=data) for name, data in images.items()]
    return [*files, File.generated(config, page_path(source), content=text)], linked


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all pages, their images, the files that they link to, and the navigation."""
    shown, others = notebooks(), []
    documents = sorted(path.name for path in ROOT.glob("*.md"))
    waiting, done = ["README.md", *(path.as_posix() for path in shown), *documents], {"nbs/index.ipynb"}
    while waiting:
        source = waiting.pop(0)
        if source in done:
            continue
        done.add(source)
        if Path(source).suffix not in (".md", ".ipynb"):
            files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
            continue
        made, linked = page(source, config)
        for file in made:
            files.append(file)
        waiting += sorted(linked)
        others += [source] if source.endswith(".md") and source != "README.md" else []
    config.nav = navigation(shown, others)
    return files


def letter(character: str, alphabet: str) -> str:
    """The Unicode letter of a mathematical alphabet: browsers ignore MathML's `mathvariant`."""
    name = unicodedata.name(character).replace("LATIN ", "").replace("GREEK ", "").replace("LETTER ", "")
    for prefix in ("MATHEMATICAL ", ""):
        try:
            return unicodedata.lookup(f"{prefix}{alphabet} {name}")
        except KeyError:
            continue
    return character


def mathml(tex: str, display: str) -> str:
    """A formula in MathML, which browsers draw without a script."""

    def replace(match):
        alphabet = match[2].upper()
        return f"<{match[1]}>{''.join(letter(one, alphabet) for one in html.unescape(match[3]))}</{match[1]}>"

    return VARIANT.sub(replace, convert(tex, display=display))


def on_page_content(content: str, **_) -> str:
    """Replace the formulas of a page."""
    displays = {"span": "inline", "div": "block"}
    return MATH.sub(lambda match: mathml(html.unescape(match[2]).strip(), displays[match[1]]), content)
