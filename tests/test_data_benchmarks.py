"""Datasets in their official layouts, from the archives to results: by command, and through the notebooks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import test_data_cocostuff
import test_data_context
import test_data_voc
from sptseg.cli import main
from sptseg.core import UserError
from sptseg.data.benchmarks import BENCHMARKS, ON_DISK, load_benchmark

TINY = {
    **{
        "clip": "glyph-clip",
        "clip_weights": "random",
        "image_size": 32,
        "num_prompts": 2,
        "decoder_layers": 1,
        "iterations": 2,
    },
    **{"batch_size": 2, "warmup_iterations": 0, "workers": 0, "eval_every": 2, "checkpoint_every": 1},
}


def write_own_folder(root):
    """A user's folder: three classes, one of them unseen."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind, high, shape in (("images", 256, (30, 40, 3)), ("masks", 3, (30, 40))):
            (root / kind / split).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, high, shape, np.uint8)
                Image.fromarray(pixels).save(root / kind / split / f"{index}.png")
    (root / "classes.yaml").write_text(yaml.safe_dump({"classes": ["oak", "pine", "elm"], "unseen": ["elm"]}))


WRITERS = {  # command of `sptseg data`: how its archives are made
    "voc": test_data_voc.make_miniature,
    "cocostuff": test_data_cocostuff.write_archives,
    "context": test_data_context.write_archives,
}
COMMANDS = {"voc": "voc", "coco-stuff": "cocostuff", "context-59": "context", "context-60": "context", "folder": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All datasets, prepared by command: name in a recipe → folder."""
    base = tmp_path_factory.mktemp("datasets")
    write_own_folder(base / "folder")
    for command, write in WRITERS.items():
        write(base / command)
        assert main(["data", command, "--root", str(base / command), "--partial", "--workers", "0", "--quiet"]) == 0
    return {name: str(base / (command or name)) for name, command in COMMANDS.items()}


def recipe_file(folder, **changes):
    path = folder / "row.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def results_of(path):
    return json.loads(Path(path).read_text())


def test_every_dataset_on_disk_is_tested():
    assert COMMANDS.keys() == ON_DISK.keys() <= BENCHMARKS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_from_archives_to_results_by_command(data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    row = recipe_file(tmp_path, dataset=name, data_root=data[name])
    assert main(["data", "report", name, "--root", data[name], "--workers", "0", "--quiet"]) == 0
    labels = load_benchmark(name, root=data[name]).labels
    shown = capsys.readouterr().out
    assert all(f"  {label} " in shown for label in labels.classes)
    assert (tmp_path / f"report-{name}-val.png").stat().st_size > 10_000
    assert main(["train", row, "--out", "run", "--quiet"]) == 0
    assert main(["evaluate", "run", "--quiet"]) == 0
    trained, evaluated = results_of("run/results.json"), results_of(f"run/evaluation-{name}.json")
    assert trained["metrics"] == evaluated["metrics"]
    assert trained["metrics"]["IoU"].keys() == set(labels.classes)
    assert (trained["metrics"]["hIoU"] is None) == (not labels.unseen)


@pytest.mark.parametrize("name", ["voc", "folder"])
def test_the_same_through_the_notebooks(kernel, data, tmp_path, name):
    parameters = {**TINY, "dataset": name, "data_root": data[name], "train_images": None, "val_images": None}
    executed = kernel("train", tmp_path, **parameters, out="run")
    assert "image/png" in executed.read_text()
    other = "context-60" if name == "voc" else "voc"
    kernel("evaluate", tmp_path, run="run", dataset=other, data_root=data[other])
    assert results_of(tmp_path / f"run/evaluation-{other}.json")["metrics"]["hIoU"] is None


def test_across_datasets_every_class_counts_alike(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = recipe_file(tmp_path, dataset="coco-stuff", data_root=data["coco-stuff"])
    assert main(["train", row, "--out", "run", "--quiet"]) == 0
    for name in ("voc", "context-59", "context-60"):
        assert main(["evaluate", "run", f"dataset={name}", f"data_root={data[name]}", "--quiet"]) == 0
        results = results_of(f"run/evaluation-{name}.json")
        assert results["metrics"]["mIoU(U)"] is None and results["metrics"]["mIoU"] == results["metrics"]["mIoU(S)"]
        assert results["recipe"]["data_root"] == data[name]


def test_an_evaluation_needs_no_training_images(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe_file(tmp_path, dataset="folder", data_root=data["folder"]), "--out", "run"]) == 0
    for kind in ("images", "masks"):
        (tmp_path / "alone" / kind).mkdir(parents=True)
        (tmp_path / "alone" / kind / "val").symlink_to(Path(data["folder"]) / kind / "val")
    (tmp_path / "alone/classes.yaml").symlink_to(Path(data["folder"]) / "classes.yaml")
    assert main(["evaluate", "run", "data_root=alone", "--quiet"]) == 0
    assert results_of("run/evaluation-folder.json")["metrics"] == results_of("run/results.json")["metrics"]
    with pytest.raises(UserError, match="train"):
        load_benchmark("folder", root="alone")


def test_text_embeddings_from_a_file_replace_the_text_encoder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = recipe_file(tmp_path, dataset="folder", data_root=data["folder"])
    rows = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float16)
    np.save("own.npy", rows)
    np.save("scaled.npy", rows * 2)
    np.save("short.npy", rows[:2])
    for name, settings in {
        "encoder": [],
        "own": ["text_embeddings=own.npy"],
        "scaled": ["text_embeddings=scaled.npy"],
    }.items():
        assert main(["train", row, "--out", name, "--quiet", *settings]) == 0
    losses = {name: results_of(f"{name}/results.json")["history"]["train"] for name in ("encoder", "own", "scaled")}
    assert losses["own"] == losses["scaled"] != losses["encoder"]
    assert main(["train", row, "--out", "short", "--quiet", "text_embeddings=short.npy"]) == 1
    assert "short.npy: holds (2, 128)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ON_DISK)
def test_a_dataset_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(UserError, match="data_root"):
        load_benchmark(name, root=None)
    with pytest.raises(UserError, match=str(tmp_path / "nothing")) as error:
        load_benchmark(name, root=tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_a_trial_can_use_the_first_images_only(data):
    whole, some = (load_benchmark("voc", root=data["voc"], train_images=count) for count in (None, 5))
    assert (len(whole.train), len(some.train)) == (12, 5) and some.train[4].name == whole.train[4].name
    assert len(load_benchmark("voc", root=data["voc"], val_images=10**6).val) == 6


def test_another_data_seed_draws_other_images_for_training_and_test():
    def images(seed):
        benchmark = load_benchmark("glyphs-20", size=32, seed=seed, train_images=3, val_images=3)
        return torch.stack([data[index].image for data in (benchmark.train, benchmark.val) for index in range(3)])

    assert torch.equal(images(0), images(0))
    assert (images(0) != images(1)).flatten(1).any(1).all(), "no image is in both"
