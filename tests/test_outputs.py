"""Stored outputs of notebooks are those of the code, and running a notebook again leaves git clean."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

import sync

NOTEBOOKS = sorted((sync.ROOT / "nbs").glob("*.ipynb"))


def texts(cell):
    """What a cell printed and showed as text; streams that follow one another are one."""
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return printed, ["".join(output["data"].get("text/plain", "")) for output in cell["outputs"] if "data" in output]


@pytest.mark.parametrize("name", ["01_core", "45_recipe"])
def test_running_a_notebook_again_changes_no_text(name, tmp_path):
    path = sync.ROOT / f"nbs/{name}.ipynb"
    stored = json.loads(path.read_text(encoding="utf-8"))
    executed = nbformat.read(path, as_version=4)
    executed.cells.pop()  # exports the package
    NotebookClient(executed, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(stored["cells"], executed.cells, strict=False):
        if before["cell_type"] == "code":
            assert texts(after) == texts(before), "".join(before["source"])[:200]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_shows_the_address_of_an_object(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            shown = "".join(output.get("data", {}).get("text/plain", ""))
            bare = shown.startswith("<") and output["data"].keys() == {"text/plain"} and not shown.startswith("<Figure")
            source = "".join(cell["source"])
            assert not bare and not re.search(r" at 0x[0-9a-f]{6,}", shown), f"end the cell with a semicolon: {source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_shows_a_progress_bar_a_clock_or_a_measured_speed(path):
    """Each run would change them."""
    changing = re.compile(r"\d+%\|| it/s|\d\d:\d\d:\d\d|\d images/s|\d ms per ")
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), "".join(cell["source"])
            printed = "".join(output.get("text", ""))
            assert output.get("name") != "stderr" and not changing.search(printed.replace("12:00:00", "")), printed
