"""Keep the library and README.md equal to what the notebooks say.

python tests/sync.py check    names every file that differs, exit status 1 if there is one
python tests/sync.py export   writes those files

Both clean the notebooks, export them and render README.md in a temporary copy of the checkout,
so a check changes nothing, and works the same amid uncommitted work and in a fresh clone.
"""

import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("nbs/**/*.ipynb", "sptseg/**/*.py", "README.md")
LINK = re.compile(r'(\]\(|src="|href=")(?!/|#|[a-z]+:)([^)"\s]+)')


def project_files(root: Path = ROOT) -> list[str]:
    """Files of the checkout that git tracks or would add."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def copy_project(target: Path, root: Path = ROOT) -> Path:
    """Copy those files to an empty folder."""
    for name in project_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target / name)
    return target


def move_links(markdown: str, folder: str = "nbs") -> str:
    """Make links written for a file in `folder` right for a file above it; fenced code stays as it is."""
    pieces = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    for index in range(0, len(pieces), 2):
        pieces[index] = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), pieces[index])
    return "".join(pieces)


def notebook_map(root: Path) -> str:
    """The component notebooks as a Markdown table: a row per folder of the package, titles as links."""
    rows: dict[str, list[str]] = {}
    for path in sorted(root.glob("nbs/[0-9]*.ipynb")):
        title = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"][0].strip("# \n")
        folder = path.stem.split("_", 1)[1].rpartition(".")[0]
        rows.setdefault(f"`sptseg/{folder}`" if folder else "`sptseg`", []).append(f"[{title}]({path.name})")
    return "\n".join(
        ["| Folder | Notebooks |", "|---|---|", *(f"| {name} | {', '.join(x)} |" for name, x in rows.items())]
    )


def demo_results(root: Path) -> str:
    """The table of the demo, from its record, by the code under `root`."""
    program = "import json, sys; from sptseg.paper.formats import demo_table; print(demo_table(json.load(sys.stdin)))"
    record = (root / "data/results/demo/demo.json").read_text(encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=root, input=record, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the table of the demo cannot be made:\n{done.stderr}")
    return done.stdout.strip()


GENERATORS = {"notebooks": notebook_map, "results": demo_results}


def fill_marked(text: str, root: Path) -> str:
    """Replace the text between each `<!-- generated: NAME -->` and `<!-- end -->`."""
    marked = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
    return marked.sub(lambda m: f"{m[1]}\n{GENERATORS[m[2]](root)}\n\n{m[3]}", text)


def fill_index(root: Path) -> None:
    """Bring the generated parts of nbs/index.ipynb up to date."""
    path = root / "nbs/index.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = fill_marked("".join(cell["source"]), root).splitlines(keepends=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tidy_outputs(notebook: Path) -> None:
    """Merge pieces of a printed text, as JupyterLab does, and drop the state of widgets: both change with every run."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["metadata"].pop("widgets", None)
    for cell in content["cells"]:
        merged: list[dict] = []
        for output in cell.get("outputs", []):
            if merged and "name" in output and output["name"] == merged[-1].get("name"):
                merged[-1]["text"] = "".join(merged[-1]["text"] + output["text"]).splitlines(keepends=True)
            else:
                merged.append(output)
        if "outputs" in cell:
            cell["outputs"] = merged
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render_readme(notebook: Path) -> str:
    """nbs/index.ipynb as Markdown, without its hidden cells."""
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    if not notebook.is_file():
        sys.exit("nbs/index.ipynb is missing: README.md is made from it")
    hidden = {"RegexRemovePreprocessor": {"enabled": True, "patterns": [r"^#\|\s*(hide|eval:\s*false)"]}}
    content = nbformat.read(notebook, as_version=4)
    content.metadata.language_info = {"name": "python"}  # nbdev_clean drops it; code blocks are coloured by it
    body, resources = MarkdownExporter(config=Config(hidden)).from_notebook_node(content)
    if resources["outputs"]:
        sys.exit("nbs/index.ipynb: it draws an image; save it under figures/ and link to it, as README.md must")
    body = re.sub(r"<!--.*?-->\n?", "", move_links(body))
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def regenerate(root: Path) -> None:
    """Clean, export and render everything under `root` from its notebooks."""
    for module in root.glob("sptseg/**/*.py"):
        if "AUTOGENERATED! DO NOT EDIT!" in module.read_text(encoding="utf-8"):
            module.unlink()
    for command in ("nbdev_clean", "nbdev_export"):
        program = Path(sys.executable).with_name(command)
        done = subprocess.run([str(program)], cwd=root, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    for notebook in root.glob("nbs/**/*.ipynb"):
        tidy_outputs(notebook)
    fill_index(root)
    (root / "README.md").write_text(render_readme(root / "nbs/index.ipynb"), encoding="utf-8")


def contents(root: Path) -> dict[str, bytes]:
    """Every file that is generated or cleaned, with its content."""
    paths = [path for pattern in GENERATED for path in root.glob(pattern) if ".ipynb_checkpoints" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def differences(root: Path = ROOT) -> dict[str, bytes | None]:
    """Files under `root` that are not what the notebooks say, with the content they should have (None: no file)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder), root)
        before = contents(copy)
        regenerate(copy)
        after = contents(copy)
    return {name: after.get(name) for name in sorted({**before, **after}) if before.get(name) != after.get(name)}


def write(changed: dict[str, bytes | None], root: Path = ROOT) -> None:
    """Give files the content they should have."""
    for name, content in changed.items():
        print(f"{'removed' if content is None else 'written'}: {name}")
        if content is None:
            (root / name).unlink()
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)


def main(action: str) -> None:
    changed = differences()
    if action == "export":
        return write(changed)
    for name, content in changed.items():
        print(f"out of sync: {name}" + (" (no notebook exports it)" if content is None else ""))
    sys.exit("run `make export` and commit the result" if changed else 0)


if __name__ == "__main__":
    if sys.argv[1:] not in (["check"], ["export"]):
        sys.exit(__doc__)
    main(sys.argv[1])
