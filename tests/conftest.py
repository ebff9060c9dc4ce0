"""What several test files use."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

RUNS = Path(__file__).resolve().parents[1] / "nbs/runs"


@pytest.fixture
def one_thread():
    """The same order of summation as in a process with OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interrupted_after(monkeypatch):
    """A context in which a training is interrupted after an iteration, as by Ctrl-C."""
    from sptseg.training import loop

    recording = loop.record

    @contextmanager
    def interrupted(iteration, match=None):
        def interrupt(run):
            recording(run)
            if run.done == iteration:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=match):
            patch.setattr(loop, "record", interrupt)
            yield

    return interrupted


@pytest.fixture(scope="session")
def kernel():
    """A function that executes a notebook of nbs/runs as papermill does, all in one kernel, which forgets between.

    It returns the path of the executed notebook; a cell that fails raises `nbclient.exceptions.CellExecutionError`.
    """
    import nbformat
    from nbclient import NotebookClient
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    client = NotebookClient(nbformat.v4.new_notebook(), timeout=600)

    def execute(name, folder, /, **parameters):
        notebook = parameterize_notebook(load_notebook_node(str(RUNS / f"{name}.ipynb")), parameters)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\nIn.clear()\n%cd -q {folder}"))
        client.nb = notebook
        client.reset_execution_trackers()
        executed = Path(folder) / f"{name}.ipynb"
        try:
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
        finally:
            nbformat.write(notebook, executed)
        return executed

    with client.setup_kernel():
        yield execute
