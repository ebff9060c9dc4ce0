"""What the files around the library promise: one set of requirements, documented commands, a wheel that is complete."""

import ast
import html
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sptseg.recipe import load_recipe
from sync import ROOT, copy_project, project_files

CONDA_NAMES = {"pytorch": "torch", "python-build": "build"}  # every other package has the same name in both worlds
RUN_NOTEBOOKS = sorted((ROOT / "nbs/runs").glob("*.ipynb"))
RECIPES = sorted((ROOT / "nbs/experiments").rglob("*.yaml"))
PARTS = ("gpu.yaml", "label_sets", "glyph_clip", "templates", "models", "examples")
ASSETS = {("data", name) for name in PARTS}  # what the wheel holds


def name_of(path):
    return path.relative_to(ROOT / "nbs").as_posix()


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def normal(requirements):
    """{name: version limits} of requirement strings."""
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(one.name): sorted(map(str, one.specifier)) for one in parsed}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from the files that git has or would add."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_project(folder / "checkout")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The installed wheel: its folder, an empty folder, and a function that runs python there with nothing else."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        return run(sys.executable, *arguments, cwd=empty, env=environment)

    return SimpleNamespace(site=site, empty=empty, python=python)


def project_requirements():
    """Requirements of the run time and of the extras, read from the metadata that setuptools makes."""
    program = (
        "from setuptools.config.pyprojecttoml import read_configuration as read; import json;"
        "p = read('pyproject.toml', expand=False)['project'];"
        "print(json.dumps([p['dependencies'], p['optional-dependencies']]))"
    )
    runtime, extras = yaml.safe_load(run(sys.executable, "-W", "ignore", "-c", program, cwd=ROOT))
    return runtime, extras


def test_conda_users_get_the_same_requirements():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert conda[0] == "python=3.11" and environment["channels"] == ["conda-forge"]

    listed = normal(conda[1:] + pip)
    listed = {CONDA_NAMES.get(name, name): limits for name, limits in listed.items() if name not in ("pip", "make")}
    runtime, extras = project_requirements()
    wanted = normal(runtime + [one for extra in extras.values() for one in extra if not one.startswith("sptseg")])
    assert listed == wanted


def test_settings_agree_with_the_package():
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    text = (ROOT / "pyproject.toml").read_text()
    assert f'__version__ = "{settings["version"]}"' in (ROOT / "sptseg/__init__.py").read_text()
    assert f'description = "{settings["description"]}"' in text
    assert f'requires-python = ">={settings["min_python"]},' in text


def test_citation_names_the_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'__version__ = "{citation["version"]}"' in (ROOT / "sptseg/__init__.py").read_text()
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    papers = [one["value"] for paper in citation["references"] for one in paper["identifiers"]]
    assert papers == ["arXiv:2312.12754", "arXiv:2212.03588"]
    assert all(author["family-names"] for paper in citation["references"] for author in paper["authors"])


def locked():
    """{name: version} of requirements.lock."""
    pins = re.findall(r"^(\S+)==(\S+)(.*)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert all(rest == " \\" for _, _, rest in pins), "a pin has no hash"
    return {canonicalize_name(name): version for name, version, _ in pins}


def test_lock_file_satisfies_the_requirements():
    pins, (runtime, extras) = locked(), project_requirements()
    for text in runtime + extras["notebooks"] + extras["batch"]:
        wanted = Requirement(text)
        version = pins.get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version), f"requirements.lock lacks {text}; run `make lock`"
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_lock_file_has_the_versions_of_the_records():
    """Runs of the tables were all made with one set of versions."""
    pins = locked()
    for path in ROOT.glob("data/results/table*/**/seed*.json"):
        versions = json.loads(path.read_text())["versions"]
        found = {name: pins[canonicalize_name(name)] for name in versions if name != "sptseg"}
        assert found == {name: version for name, version in versions.items() if name != "sptseg"}, path


def make_targets():
    return set(re.findall(r"^([a-z0-9]+):.*##", (ROOT / "Makefile").read_text(), re.M))


def test_containers_run_targets_of_the_makefile():
    dockerfile = (ROOT / "Dockerfile").read_text()
    devcontainer = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    command = json.loads(re.search(r"^CMD (.*)$", dockerfile, re.M)[1])
    run_lines = re.findall(r"^RUN make (\w+)$", dockerfile, re.M)
    started = [devcontainer[key].split() for key in ("updateContentCommand", "postCreateCommand")]
    assert command == ["make", "demo"] and run_lines == ["install"]
    assert all(make == "make" and target in make_targets() for make, target in started)
    assert (ROOT / ".devcontainer" / devcontainer["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"


def test_copied_files_of_the_dockerfile_exist():
    copied = re.findall(r"^COPY --chown=\w+ (\S+) ", (ROOT / "Dockerfile").read_text(), re.M)
    assert copied and all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflow_runs_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    commands = " ".join(step.get("run", "") for step in steps)
    assert set(re.findall(r"\bmake (\w+)", commands)) <= make_targets()
    assert all((ROOT / name).is_file() for name in re.findall(r"nbs/\S+\.ipynb", commands))
    assert "://" not in path.read_text()


@pytest.fixture(scope="module")
def site():
    """The functions that collect the pages of the documentation site."""
    for name in ("mkdocs", "latex2mathml"):
        pytest.importorskip(name, reason="installed by make docs")
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "nbs/_mkdocs/hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_site_shows_every_notebook_once(site):
    paths = site.notebooks()
    nav = site.navigation(paths, [])
    pages = [page for entry in nav for page in (next(iter(entry.values())) if isinstance(entry, dict) else [entry])]
    expected = {path.relative_to(ROOT).with_suffix(".md").as_posix() for path in ROOT.glob("nbs/**/*.ipynb")}
    hidden = {name for name in expected if re.search(r"/[._]", name)} | {"nbs/index.md"}
    assert pages[0] == "README.md" and sorted(pages[1:]) == sorted(expected - hidden)
    assert site.section(Path("nbs/80_data.voc.ipynb")) == "Data" and site.section(Path("nbs/01_core.ipynb")) == ""


def test_site_links_notebooks_to_pages(site):
    text, linked = site.relink(
        "[a](index.ipynb#It's-1-·-of-2) [b](runs/demo.ipynb) [c](../LICENSE) [d](https://a.org/b.ipynb)", "nbs/z.md"
    )
    assert text == "[a](../README.md#its-1-of-2) [b](runs/demo.md) [c](../LICENSE) [d](https://a.org/b.ipynb)"
    assert linked == {"nbs/index.ipynb", "nbs/runs/demo.ipynb", "LICENSE"}


def test_site_draws_formulas_without_a_script(site):
    drawn = site.on_page_content(r'<span class="arithmatex">\(\mathbf{S} \in \mathcal F &lt; 1\)</span>')
    drawn = html.unescape(drawn)
    assert drawn.startswith("<math") and "𝐒" in drawn and "ℱ" in drawn and "mathvariant" not in drawn


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="checks the environment that make install made")
def test_installed_packages_fit_together():
    assert "No broken requirements" in run(sys.executable, "-m", "pip", "check")


def test_every_make_target_is_listed_with_a_line():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9]+):.*##", makefile, re.M)
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    shown = dict(re.findall(r"^  make ([a-z0-9]+) +(\S.*)$", run("make", "-C", ROOT, "help"), re.M))
    assert sorted(targets) == sorted(phony) == sorted(shown)


def test_make_with_an_unsuitable_python_says_so_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path)
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "MAKEFLAGS", "MAKELEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in active}
    command = ["make", "-C", str(tmp_path), "install", "PYTHON=false"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    assert errors == ["error: false is not Python 3.10 to 3.13; name one: make install PYTHON=python3.11"]


def test_wheel_holds_what_the_run_time_needs_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for name in project_files():
        path = Path(name)
        if path.parts[0] == "sptseg":
            expected.add(name)
        elif path.parts[:2] in ASSETS or name == "data/__init__.py":
            expected.add("sptseg/assets/" + path.relative_to("data").as_posix())
        elif path.parts[:2] == ("nbs", "experiments") and path.suffix in (".py", ".yaml"):
            expected.add("sptseg/experiments/" + path.relative_to("nbs/experiments").as_posix())
    assert names == expected
    assert "sptseg/assets/label_sets/voc.yaml" in names


def test_wheel_works_away_from_the_checkout(installed):
    modules = "sptseg, sptseg.assets, sptseg.experiments, sptseg.data"
    places = installed.python("-c", f"import {modules}; print(*(module.__file__ for module in ({modules})))").split()
    assert len(places) == 4 and all(place.startswith(str(installed.site)) for place in places)
    program = "from sptseg.core import asset_path; print(asset_path('label_sets/voc.yaml'))"
    assert installed.python("-c", program).startswith(str(installed.site))


def test_the_first_block_of_the_readme_runs_from_the_wheel(installed):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    try:
        installed.python("-c", block)
        assert [path.name for path in installed.empty.iterdir()] == ["overlay.png"]
    finally:
        (installed.empty / "overlay.png").unlink(missing_ok=True)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1200


@pytest.mark.skipif(find_spec("sptseg.cli") is None, reason="sptseg.cli does not exist yet")
def test_console_command_of_the_wheel(installed):
    assert "train" in installed.python("-m", "sptseg.cli", "--help")
    assert not any(installed.empty.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sptseg.cli") is None, reason="sptseg.cli does not exist yet")
def test_wheel_trains_in_an_empty_folder(installed):
    installed.python("-m", "sptseg.cli", "train", "demo/smoke", "--out", "run")
    assert [path.name for path in installed.empty.iterdir()] == ["run"]
    assert list((installed.empty / "run").rglob("*.safetensors"))


def parameters_cell(notebook):
    """The source of the one cell tagged `parameters`."""
    cells = nbformat.read(notebook, as_version=4).cells
    [cell] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


@pytest.mark.parametrize("notebook", RUN_NOTEBOOKS, ids=name_of)
def test_parameters_are_typed_and_explained(notebook):
    source = parameters_cell(notebook)
    lines = source.splitlines()
    statements = ast.parse(source).body
    assert statements
    for statement in statements:
        text = ast.unparse(statement)
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None, f"not `name: type = value`: {text}"
        assert re.search(r"#\s*\w", lines[statement.end_lineno - 1][statement.end_col_offset :]), f"no comment: {text}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipes_have_only_known_keys(recipe):
    """A file is a Recipe, or sets parameters of a notebook in nbs/runs, with which its name or folder begins."""
    names = (recipe.stem, recipe.parent.name, f"{recipe.parent.name}_{recipe.stem}")
    notebooks = [
        path for path in (ROOT / "nbs/runs").glob("*.ipynb") if any(name.startswith(path.stem) for name in names)
    ]
    known = [{statement.target.id for statement in ast.parse(parameters_cell(path)).body} for path in notebooks]
    if not any(set(yaml.safe_load(recipe.read_text())) <= parameters for parameters in known):
        load_recipe(recipe)


def test_make_demo_passes_all_its_seeds():
    dry = subprocess.run(["make", "-n", "demo", "SEEDS=0,1,2"], cwd=ROOT, capture_output=True, text=True, check=True)
    words = shlex.split(next(line for line in dry.stdout.replace("\\\n", " ").splitlines() if "papermill" in line))
    parameters = yaml.safe_load(words[words.index("-y") + 1])
    assert parameters == {"seeds": [0, 1, 2], "command": "make demo SEEDS=0,1,2"}


def test_a_public_name_means_one_thing():
    """No function, class or constant of the package has a namesake in another module; `main` is a module's command."""
    homes = {}
    for path in sorted((ROOT / "sptseg").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.stem != "_modidx" else ():
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            names = [getattr(target, "name", getattr(target, "id", "_")) for target in targets]
            for name in names:
                if not name.startswith("_") and name != "main":
                    homes.setdefault(name, []).append(path.name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
