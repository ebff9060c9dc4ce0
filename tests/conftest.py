"""What several test files use."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """The same order of summation as in a process with OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
