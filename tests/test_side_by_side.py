"""Runs side by side: the same results as one after the other; errors and Ctrl-C end all and lose nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sptseg.core import UserError
from sptseg.recipe import load_recipe
from sptseg.training import side_by_side
from sptseg.training.checkpoint import checkpoints
from sptseg.training.loop import train
from sptseg.training.side_by_side import runs_at_once, train_side_by_side

TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
SHORT = {
    **{"device": "cpu", "tracker": "none", "iterations": 3, "eval_every": 3, "val_images": 1, "decoder_layers": 1},
    **{"image_size": 32, "num_prompts": 2, "train_images": 4, "batch_size": 2},
}


def recipes(**changes):
    return [load_recipe("demo/smoke", **{**SHORT, "method": name, **changes}) for name in ("zegclip", "spt-seg")]


def folders(root):
    return [root / name for name in ("zegclip", "spt-seg")]


def test_how_many_fit(one_thread, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    assert [runs_at_once(recipes() * count) for count in (1, 2, 3)] == [2, 4, 4]
    assert runs_at_once(recipes()[:1]) == 1 and runs_at_once(recipes(n_proc=2)) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert runs_at_once(recipes()) == 1


@pytest.mark.slow
@TWO_CORES
def test_results_are_those_of_runs_alone_and_an_error_ends_all(tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(side_by_side, "runs_at_once", lambda recipes: 2)
    together = train_side_by_side(list(zip(recipes(), folders(tmp_path), strict=True)), progress=False)
    alone = [train(*run, progress=False) for run in zip(recipes(), folders(tmp_path / "alone"), strict=True)]
    assert [run["history"] for run in together] == [run["history"] for run in alone]
    for one, other in zip(folders(tmp_path), folders(tmp_path / "alone"), strict=True):
        weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    good, bad = recipes(iterations=100_000)[0], recipes(clip="no-such-clip")[1]
    with pytest.raises(UserError, match="no-such-clip"):
        train_side_by_side([(good, tmp_path / "long"), (bad, tmp_path / "bad")], progress=False)
    assert not (tmp_path / "long/results.json").exists()


PROGRAM = """
from pathlib import Path
import sys
from sptseg.recipe import load_recipe
from sptseg.training import side_by_side
side_by_side.runs_at_once = lambda recipes: 2
if __name__ == "__main__":
    shared = dict({settings}, iterations=100_000, eval_every=100_000, checkpoint_every=3)
    recipes = [load_recipe("demo/smoke", **dict(shared, method=name)) for name in ("zegclip", "spt-seg")]
    side_by_side.train_side_by_side([(recipe, Path(sys.argv[1], recipe.method)) for recipe in recipes])
"""


@pytest.mark.slow
@TWO_CORES
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_saves_all_runs(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("{settings}", repr(SHORT)))
    process = subprocess.Popen(
        [sys.executable, script, tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores Ctrl-C
    )
    while not all(checkpoints(folder) for folder in folders(tmp_path)) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    for folder in folders(tmp_path):
        done = int(checkpoints(folder)[0].stem.rpartition("-")[2])
        assert f"{folder}: stopped, iteration {done} of 100000 is saved" in said
