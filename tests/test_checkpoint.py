"""Checkpoints: whole or not there, and never lost."""

import subprocess
import sys
import textwrap

import pytest
import torch

from sptseg.core import UserError
from sptseg.training.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint

EMPTY = {"train": [], "val": []}


class Model(torch.nn.Linear):
    def stored_tensors(self):
        return dict(self.named_parameters())


def make(width=4):
    model = Model(width, width)
    return model, torch.optim.AdamW(model.parameters())


def save(out, iteration, model, optimiser, keep=2):
    save_checkpoint(out, iteration, dict(model.named_parameters()), optimiser, EMPTY, keep)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    program = """
        import resource, sys
        from pathlib import Path
        import test_checkpoint as here

        out = Path(sys.argv[1])
        here.save(out, 1, *here.make(4))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may become larger
        try:
            here.save(out, 2, *here.make(500), keep=1)
        except here.UserError as error:
            print(error)
        """
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=__file__.rsplit("/", 1)[0])
    path = checkpoint_path(tmp_path, 2)
    assert done.stdout.startswith(f"{path}: cannot be written (") and done.stdout.count("\n") == 1
    assert "earlier checkpoints are kept" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint_path(tmp_path, 1).name]
    assert load_checkpoint(tmp_path, *make(4))[0] == 1


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model, optimiser = make()
    save(tmp_path, 1, model, optimiser)
    torch.nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(UserError, match="iteration 2: weights are not finite; lower lr"):
        save(tmp_path, 2, model, optimiser)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]


def test_the_newest_is_that_of_most_iterations(tmp_path):
    model, optimiser = make()
    for iteration in (999_999, 1_000_000, 20):
        save(tmp_path, iteration, model, optimiser, keep=3)
    names = [checkpoint_path(tmp_path, iteration) for iteration in (1_000_000, 999_999, 20)]
    assert checkpoints(tmp_path) == names
    (tmp_path / ".checkpoint-2000000.pt.7.tmp").write_bytes(b"half of it")  # what a kill leaves
    assert checkpoints(tmp_path) == names


def test_model_and_optimiser_come_back(tmp_path):
    torch.manual_seed(0)
    (model, optimiser), inputs = make(), torch.randn(3, 4)

    def step(model, optimiser):
        optimiser.zero_grad()
        model(inputs).square().sum().backward()
        optimiser.step()

    step(model, optimiser)
    save(tmp_path, 1, model, optimiser)
    again = make()
    assert load_checkpoint(tmp_path, *again) == (1, EMPTY)
    for pair in ((model, optimiser), again):
        step(*pair)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again[0].parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1, *make(4))
    with pytest.raises(UserError, match="2 of another shape, such as weight.; continue with the recipe"):
        load_checkpoint(tmp_path, *make(5))


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save(Dangerous(), checkpoint_path(tmp_path, 1))
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_checkpoint(tmp_path, *make())


def test_tensors_of_other_names_are_refused_rather_than_skipped(tmp_path):
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    save(tmp_path, 7, other, torch.optim.AdamW(other.parameters()))
    model, optimizer = make()
    before = model.weight.clone()
    with pytest.raises(UserError, match="2 missing, such as weight; 2 unexpected, such as 0.weight"):
        load_checkpoint(tmp_path, model, optimizer)
    assert torch.equal(model.weight, before)
