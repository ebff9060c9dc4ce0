"""What several test files use."""

from contextlib import contextmanager

import pytest
import torch


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
