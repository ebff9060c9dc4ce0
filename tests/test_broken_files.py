"""Broken images and masks: named before time is spent, and never at the cost of iterations that are done."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sptseg.cli import main
from sptseg.core import UserError
from sptseg.data.benchmarks import load_benchmark
from sptseg.data.integrity import check_readable, seems_complete
from sptseg.recipe import check_recipe
from sptseg.training.batches import BatchSampler
from sptseg.training.checkpoint import checkpoints
from sptseg.training.loop import train
from sptseg.training.run_folder import RESULTS, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    **{
        "dataset": "folder",
        "clip": "glyph-clip",
        "image_size": 32,
        "num_prompts": 2,
        "decoder_layers": 1,
        "iterations": 6,
        "batch_size": 2,
    },
    **{"warmup_iterations": 0, "eval_every": 2, "checkpoint_every": 6, "keep_final_checkpoints": True},
    **{"tracker": "none"},
}


def write_image(path, seed=0, size=(48, 40)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def write_mask(path, seed=0, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 2, size[::-1], np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """A dataset of four training and three test images."""
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            write_image(tmp_path / f"data/images/{split}/photo{index}.png", index)
            write_mask(tmp_path / f"data/masks/{split}/photo{index}.png", index)
    (tmp_path / "data/classes.yaml").write_text("classes: [red cat, blue heart]\nunseen: [blue heart]\n")
    return tmp_path / "data"


def recipe(root, **changes):
    return check_recipe({**SETTINGS, "data_root": str(root), **changes})


def cut(path):
    os.truncate(path, path.stat().st_size - 20)


def flip_in_the_middle(path):
    """Change bytes without a change of the file's size."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(255 - byte for byte in content[middle : middle + 4])
    path.write_bytes(content)


SUFFIXES = ("jpg", "png", "webp", "bmp")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_shortened_file_is_suspected(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    write_image(path)
    size = path.stat().st_size
    assert seems_complete(path)
    for kept in (0, 1, 30, size // 3, size - 9, size - 1):
        os.truncate(shutil.copy(path, tmp_path / f"short.{suffix}"), kept)
        assert not seems_complete(tmp_path / f"short.{suffix}"), f"{kept} of {size} bytes"


@pytest.mark.parametrize("place", ["images/train", "masks/train", "images/val", "masks/val"])
@pytest.mark.parametrize("damage", [cut, lambda path: os.truncate(path, 0), lambda path: path.write_text("<html>404")])
def test_a_broken_file_is_named(root, place, damage):
    broken, benchmark = root / place / "photo2.png", load_benchmark("folder", root=root)
    damage(broken)
    with pytest.raises(UserError, match=r"\(1 of 14 files cannot be used\)$") as error:
        check_readable(benchmark.train, benchmark.val, progress=False)
    assert str(error.value).startswith(f"{broken}: ") and "\n" not in str(error.value)


def test_colours_in_a_mask_are_found_before_the_first_iteration(root, tmp_path, monkeypatch):
    write_image(root / "masks/val/photo1.png")
    monkeypatch.setattr("sptseg.training.loop.step", None)
    with pytest.raises(UserError, match=r"photo1.png: holds colours .*\(1 of 14 files"):
        train(recipe(root), tmp_path / "run", progress=False)


def test_files_that_a_run_does_not_read_do_not_matter(root):
    cut(root / "images/val/photo2.png")
    benchmark = load_benchmark("folder", root=root, val_images=2)
    check_readable(benchmark.train, benchmark.val, progress=False)
    with pytest.raises(UserError, match="photo2"):
        check_readable(load_benchmark("folder", root=root).val, progress=False)


def test_data_behind_the_end_of_an_image_is_harmless(root):
    path = root / "images/train/photo0.png"
    path.write_bytes(path.read_bytes() + b"written by a camera")
    check_readable(load_benchmark("folder", root=root).train, progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_that_fails_costs_no_iteration(root, tmp_path, workers):
    whole, out, broken = tmp_path / "whole", tmp_path / "run", root / "images/val/photo1.png"
    train(recipe(root), whole, progress=False)
    good = broken.read_bytes()
    flip_in_the_middle(broken)
    for _ in range(2):
        with pytest.raises(UserError, match=r"iteration 2 of 6 is saved in .*run$") as error:
            train(recipe(root, workers=workers), out, progress=False)
        assert str(error.value).startswith(f"{broken}: ") and "\n" not in str(error.value)
        assert torch.load(checkpoints(out)[0], weights_only=True)["iteration"] == 2, "the next checkpoint is due at 6"
    broken.write_bytes(good)
    train(recipe(root), out, progress=False)
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def break_image_of_second_iteration(root, settings):
    """Damage the last image of the batch: of several processes, the last one reads it."""
    _, index = list(BatchSampler(length=4, recipe=settings))[1][-1]
    flip_in_the_middle(root / f"images/train/photo{index}.png")
    return root / f"images/train/photo{index}.png"


def check_stopped_in_second_iteration(settings, out, broken):
    with pytest.raises(UserError, match=rf"^{broken}: .*; iteration 1 of 6 is saved in {out}$"):
        train(settings, out, progress=False)
    assert [torch.load(path, weights_only=True)["iteration"] for path in checkpoints(out)] == [1]


def test_a_training_image_that_breaks_during_a_run_costs_no_iteration(root, tmp_path):
    settings, whole, out = recipe(root, eval_every=6), tmp_path / "whole", tmp_path / "run"
    train(settings, whole, progress=False)
    shutil.copytree(root, tmp_path / "copy")
    broken = break_image_of_second_iteration(root, settings)
    check_stopped_in_second_iteration(settings, out, broken)
    shutil.copy(tmp_path / "copy" / broken.relative_to(root), broken)
    train(settings, out, progress=False)
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_the_process_that_finds_a_broken_image_saves_the_iterations(root, tmp_path):
    settings = recipe(root, eval_every=6, n_proc=2)
    check_stopped_in_second_iteration(settings, tmp_path / "run", break_image_of_second_iteration(root, settings))


def test_an_evaluation_alone_names_the_broken_image(root, tmp_path, capsys):
    train(recipe(root), tmp_path / "run", progress=False)
    cut(root / "masks/val/photo0.png")
    (tmp_path / "run" / RESULTS).unlink()
    assert main(["evaluate", str(tmp_path / "run"), "--quiet"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"sptseg: {root}/masks/val/photo0.png: ") and printed.count("\n") == 1
    assert not list((tmp_path / "run").glob("evaluation*"))


def test_any_other_error_of_an_evaluation_saves_the_iterations_too(root, tmp_path, monkeypatch):
    monkeypatch.setattr("sptseg.training.evaluations.evaluate", lambda *arguments: [].pop())
    with pytest.raises(IndexError):
        train(recipe(root), tmp_path, progress=False)
    assert torch.load(checkpoints(tmp_path)[0], weights_only=True)["iteration"] == 2
