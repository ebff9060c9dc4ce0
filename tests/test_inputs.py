"""A run knows what it reads: other data, another CLIP or other initial weights never pass for its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from sptseg.cli import main
from sptseg.core import UserError
from sptseg.evaluation.evaluate import evaluate_weights, recipe_of_run
from sptseg.recipe import check_recipe, load_recipe
from sptseg.training.checkpoint import checkpoints
from sptseg.training.loop import train
from sptseg.training.run_folder import INPUTS, RECIPE, RESULTS, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {
    **{
        "dataset": "folder",
        "clip": "glyph-clip",
        "image_size": 32,
        "num_prompts": 2,
        "decoder_layers": 2,
        "iterations": 4,
        "batch_size": 2,
    },
    **{"warmup_iterations": 0, "lr": 1e-3, "eval_every": 4, "checkpoint_every": 2, "tracker": "none"},
}


def make_folder(root, classes=("red cat", "blue heart"), unseen=(), images=4, seed=0, size=40):
    """A dataset of random images; the middle of each mask is class 1."""
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            pixels = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
            mask = np.zeros((size, size), np.uint8)
            mask[10:30, 10:30] = 1
            Image.fromarray(pixels).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    (root / "classes.yaml").write_text(yaml.safe_dump({"classes": list(classes), "unseen": list(unseen)}))
    return root


def short(root, **changes):
    return check_recipe({**SHORT, "data_root": str(root), **changes})


def run(root, out, **changes):
    return train(short(root, **changes), out, progress=False)


@pytest.fixture
def home(tmp_path):
    return make_folder(tmp_path / "home")


CHANGES = {
    "unknown words": lambda root: make_folder(root, classes=("water", "road")),
    "another class list": lambda root: make_folder(root, classes=("green knight", "yellow star")),
    "other templates": lambda root: (root / "classes.yaml").write_text(
        yaml.safe_dump({"classes": ["red cat", "blue heart"], "templates": ["a drawing of a {}"]})
    ),
    "one image more": lambda root: make_folder(root, images=5),
    "another image": lambda root: Image.new("RGB", (40, 40)).save(root / "images/train/0.png"),
    "another mask in the test set": lambda root: Image.new("L", (40, 40)).save(root / "masks/val/3.png"),
}


@pytest.mark.parametrize(("change", "finished"), [*((change, True) for change in CHANGES), ("one image more", False)])
def test_a_run_is_not_continued_on_other_data(tmp_path, home, interrupted_after, change, finished):
    out = tmp_path / "run"
    with nullcontext() if finished else interrupted_after(2):
        run(home, out)
    other = shutil.copytree(home, tmp_path / "other")
    CHANGES[change](other)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(
        UserError, match=r"holds a run on other data \((train|val|classes): .* → .*choose another folder"
    ):
        run(other, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_moved_data_are_the_same_data(tmp_path, home, interrupted_after):
    whole = run(home, tmp_path / "whole")
    with interrupted_after(2):
        run(home, tmp_path / "run")
    moved = home.rename(tmp_path / "elsewhere")
    assert run(moved, tmp_path / "run")["metrics"] == whole["metrics"]
    assert run(moved, tmp_path / "run")["metrics"] == whole["metrics"]  # finished
    with pytest.raises(UserError, match="home: this folder does not exist"):
        run(home, tmp_path / "run")


def test_results_name_the_data_and_an_older_run_warns(tmp_path, home):
    results = run(home, tmp_path / "run")
    assert results["inputs"]["train"].startswith("4 images") and results["inputs"]["classes"].startswith("2 classes")
    (tmp_path / "run" / INPUTS).unlink()
    with pytest.warns(UserWarning, match="older run, which does not name its data"):
        assert run(home, tmp_path / "run")["metrics"] == results["metrics"]


def test_glyphs_run_on_unaffected(tmp_path):
    out = tmp_path / "run"
    recipe = {**SHORT, "dataset": "glyphs-20", "train_images": 4, "val_images": 2}
    first = train(check_recipe(recipe), out, progress=False)
    assert list(first["inputs"]) == ["clip", "classes"]
    assert train(check_recipe(recipe), out, progress=False) == first


def test_an_evaluation_on_another_folder_is_its_own(tmp_path):
    """Other classes inherit neither embeddings nor split; other images have a record of their own."""
    first = make_folder(tmp_path / "first", unseen=["blue heart"])
    second = make_folder(tmp_path / "second", classes=["green knight", "yellow star"], unseen=["green knight"])
    third = make_folder(tmp_path / "third", unseen=["blue heart"], seed=1, images=3)
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(2, 128)).astype("f4"))
    out = tmp_path / "run"
    run(first, out, text_embeddings=str(tmp_path / "text.npy"))
    records = {}
    for root in (first, second, third):
        assert main(["evaluate", str(out), "--quiet", f"data_root={root}"]) == 0
        new = set(out.glob("evaluation-*.json")) - set(records)
        assert len(new) == 1
        records[new.pop()] = root.name
    own, other, same = ({name: path for path, name in records.items()}[key] for key in ("first", "second", "third"))
    assert own.name == "evaluation-folder.json" and other.name.startswith("evaluation-folder-second-")
    contents = {path: json.loads(path.read_text()) for path in (own, other, same)}
    assert contents[own]["recipe"]["text_embeddings"] == contents[same]["recipe"]["text_embeddings"] is not None
    assert contents[other]["recipe"]["text_embeddings"] is None
    assert contents[own]["metrics"]["mIoU(U)"] is not None and contents[other]["metrics"]["mIoU(U)"] is None
    assert list(contents[other]["metrics"]["IoU"]) == ["green knight", "yellow star"]
    assert recipe_of_run(out, data_root=str(second)).text_embeddings is None


def test_a_changed_class_file_in_the_same_folder_is_another_dataset(tmp_path, home):
    run(home, tmp_path / "run", text_embeddings=None)
    make_folder(home, classes=("green knight", "yellow star"))
    assert main(["evaluate", str(tmp_path / "run"), "--quiet"]) == 0
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "run").glob("evaluation*")] == [
        "evaluation-folder-home"
    ]


def test_a_clip_with_other_weights_is_refused(tmp_path, home, capsys):
    out = tmp_path / "run"
    run(home, out)
    assert main(["evaluate", str(out), "--quiet", "clip_weights=random"]) == 1
    assert "other weights of clip" in capsys.readouterr().err
    with pytest.raises(UserError, match="clip_weights None → 'random'"):
        run(home, out, clip_weights="random")
    with pytest.raises(UserError, match="other weights of clip"):
        evaluate_weights(short(home, clip_weights="random"), out / WEIGHTS, progress=False)


def test_training_starts_from_given_weights(tmp_path, home):
    first = run(home, tmp_path / "first")
    again = run(
        home, tmp_path / "again", init_from=str(tmp_path / "first" / WEIGHTS), lr=1e-9, min_lr=1e-12, weight_decay=0
    )
    assert again["inputs"]["init_from"].startswith(str(tmp_path / "first" / WEIGHTS))
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "again"))
    assert all((old[key] - new[key]).abs().max() < 1e-5 for key in old)
    assert first["metrics"]["pAcc"] == pytest.approx(again["metrics"]["pAcc"], abs=0.5)
    shutil.rmtree(tmp_path / "first")  # not needed any more
    assert (
        run(
            home, tmp_path / "again", init_from=str(tmp_path / "first" / WEIGHTS), lr=1e-9, min_lr=1e-12, weight_decay=0
        )
        == again
    )


def test_unsuitable_initial_weights_are_refused(tmp_path, home):
    run(home, tmp_path / "first")
    weights = str(tmp_path / "first" / WEIGHTS)
    for changes, message in (
        ({"num_prompts": 3}, "num_prompts=2"),
        ({"method": "zegclip"}, "holds another model"),
        ({"clip_weights": "random"}, "other weights of clip"),
    ):
        with pytest.raises(UserError, match=message):
            run(home, tmp_path / "other", init_from=weights, **changes)
    with pytest.raises(UserError, match="nowhere.safetensors: cannot be read"):
        run(home, tmp_path / "other", init_from="nowhere.safetensors")


def test_a_longer_run_takes_over_the_state_of_a_shorter_one(tmp_path, home):
    first = run(home, tmp_path / "first", keep_final_checkpoints=True)
    longer = run(home, tmp_path / "longer", iterations=6, continue_from=str(tmp_path / "first"))
    rows = longer["history"]["train"]
    assert rows[:4] == first["history"]["train"] and [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "checkpoint-000004.pt" in longer["inputs"]["continue_from"]
    assert (tmp_path / "first" / RESULTS).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 4}, "ran for 4 iterations; raise iterations"),
        ({"iterations": 6, "lr": 1e-2}, r"another recipe \(lr\)"),
        ({"iterations": 6, "num_prompts": 3}, r"another recipe \(num_prompts\)"),
        ({"iterations": 6, "init_from": "x.safetensors"}, "both are given"),
    ],
)
def test_what_cannot_be_prolonged_is_refused(tmp_path, home, changes, message):
    run(home, tmp_path / "first", keep_final_checkpoints=True)
    with pytest.raises(UserError, match=message):
        run(home, tmp_path / "longer", continue_from=str(tmp_path / "first"), **changes)
    assert not (tmp_path / "longer" / RECIPE).exists()
    for path in checkpoints(tmp_path / "first"):
        path.unlink()
    with pytest.raises(UserError, match="keeps no checkpoint; use init_from="):
        run(home, tmp_path / "longer", iterations=6, continue_from=str(tmp_path / "first"))


def test_intervals_may_change_until_the_end(tmp_path, home, interrupted_after, capsys):
    whole = run(home, tmp_path / "whole")
    with interrupted_after(3, match="iteration 3 of 4 is saved"):
        run(home, tmp_path / "run")
    results = train(short(home, eval_every=2, checkpoint_every=1), tmp_path / "run")
    assert results["metrics"] == whole["metrics"]
    printed = capsys.readouterr()
    assert "continuing at 3 of 4" in printed.out + printed.err
    with pytest.raises(UserError, match="eval_every 2 → 4"):
        run(home, tmp_path / "run", checkpoint_every=1)
    train(short(home, eval_every=2, checkpoint_every=1), tmp_path / "run")
    printed = capsys.readouterr()
    assert "finished already" in printed.out + printed.err


def test_focal_and_auxiliary_weights_reach_the_loss(tmp_path, home):
    plain, weighted = (
        run(home, tmp_path / name, iterations=1, eval_every=1, **changes)["history"]["train"][0]
        for name, changes in (("plain", {}), ("weighted", {"focal_weight": 20, "auxiliary_weight": 3}))
    )
    assert weighted["focal"] == pytest.approx(plain["focal"] / 5, rel=1e-5)
    assert weighted["ssim"] == pytest.approx(plain["ssim"] * 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_saves_the_last_iteration(tmp_path, number, processes):
    """No checkpoint is due; the signal makes one, and the continued run equals an uninterrupted one."""
    settings = {"iterations": 60, "eval_every": 60, "checkpoint_every": 60, "dropout": 0, "n_proc": processes}
    command = [sys.executable, "-u", "-m", "sptseg.cli", "train", "demo/smoke", "--out"]
    out, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, str(out), *(f"{key}={value}" for key, value in settings.items())],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 120
        while "0/60" not in log.read_text() and time.monotonic() < deadline:  # the progress bar
            time.sleep(0.05)
        time.sleep(1)  # some iterations
        process.send_signal(number)
        status = process.wait(120)
    assert status == 130, log.read_text()
    saved = checkpoints(out)
    assert len(saved) == 1 and f"iteration {int(saved[0].stem[-6:])} of 60 is saved" in log.read_text()
    if (number, processes) == (signal.SIGINT, 1):
        for folder in (out, tmp_path / "whole"):
            train(load_recipe("demo/smoke", **settings), folder, progress=False)
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
