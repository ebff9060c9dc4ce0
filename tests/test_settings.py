"""Settings that can only fail later are refused before the first iteration, and devices are chosen by name."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sptseg.cli import main
from sptseg.core import UserError
from sptseg.data.label_sets import LabelSet, load_label_set
from sptseg.models.device import choose_device
from sptseg.recipe import check_recipe
from sptseg.training.checkpoint import checkpoints
from sptseg.training.evaluations import best_evaluation, ranking_metric
from sptseg.training.loop import train
from sptseg.training.run_folder import RESULTS, WEIGHTS
from sptseg.training.settings import check_settings, setting_problems

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    **{"dataset": "folder", "clip": "glyph-clip", "image_size": 32, "num_prompts": 2, "decoder_layers": 1},
    **{"iterations": 2, "batch_size": 2, "warmup_iterations": 0, "tracker": "none"},
}
PAIR = ("red cat", "blue heart")
SEEN_ONLY, DIVIDED = LabelSet("pair", PAIR), LabelSet("pair", PAIR, unseen=(1,))


def tiny(**changes):
    return check_recipe({**TINY, **changes})


@pytest.fixture
def root(tmp_path):
    """A dataset of three images without unseen classes."""
    random = np.random.default_rng(3)
    for split in ("train", "val"):
        for kind, shape, top in (("images", (40, 48, 3), 256), ("masks", (40, 48), 2)):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            for name in "abc":
                Image.fromarray(random.integers(0, top, shape, np.uint8)).save(folder / f"{name}.png")
    (tmp_path / "data/classes.yaml").write_text("classes: [red cat, blue heart]\n")
    return tmp_path / "data"


REFUSED = [
    ({"setting": "transductive"}, "setting: transductive needs unseen classes, and pair has none"),
    ({"best_by": "mIoU(U)"}, "best_by: mIoU(U) needs unseen classes, and pair has none"),
    ({"lr": 1e-5, "min_lr": 1e-3}, "min_lr: 0.001 is above lr (1e-05)"),
    ({"ratio_range": [1.5, 1.0]}, "ratio_range: [1.5, 1.0] is not in order"),
    ({"focal_weight": 0, "auxiliary_weight": 0}, "focal_weight: 0 without an auxiliary loss"),
    ({"focal_weight": 0, "auxiliary_loss": "none"}, "focal_weight: 0 without an auxiliary loss"),
]


@pytest.mark.parametrize(("changes", "start"), REFUSED)
def test_settings_that_cannot_work_are_refused_with_a_remedy(changes, start):
    with pytest.raises(UserError) as error:
        check_settings(tiny(**changes), SEEN_ONLY)
    assert str(error.value).startswith(start) and "; " in str(error.value) and "\n" not in str(error.value)


def test_settings_that_work_pass():
    for changes in ({"setting": "transductive"}, {"best_by": "mIoU(U)"}, {"focal_weight": 0}, {"lr": 1e-6}):
        assert not list(setting_problems(tiny(**changes), DIVIDED))
    for setting in ("inductive", "supervised"):
        assert not list(setting_problems(tiny(setting=setting), SEEN_ONLY))
    for name in ("voc", "coco-stuff", "glyphs-20", "glyphs-stuff"):
        assert not list(setting_problems(tiny(setting="transductive", best_by="mIoU(U)"), load_label_set(name)))


def test_a_transductive_run_without_unseen_classes_ends_before_its_first_iteration(root, tmp_path, monkeypatch):
    monkeypatch.setattr("sptseg.training.loop.train_here", None)
    with pytest.raises(UserError, match=r"^setting: transductive needs unseen classes, and data has none; list some"):
        train(tiny(data_root=str(root), setting="transductive"), tmp_path / "run", progress=False)
    assert not checkpoints(tmp_path / "run")


def test_without_unseen_classes_the_best_evaluation_is_named_by_its_real_metric(root, tmp_path):
    results = train(tiny(data_root=str(root)), tmp_path / "run", progress=False)
    assert results["recipe"]["best_by"] == "hIoU" and results["metrics"]["hIoU"] is None
    assert results["best"]["by"] == "mIoU"
    rows = [{"hIoU": 1.0, "mIoU": 9.0}, {"hIoU": 2.0, "mIoU": 3.0}]
    assert ranking_metric(rows, "hIoU") == "hIoU" and best_evaluation(rows, "hIoU") is rows[1]


def test_seeds_that_no_generator_takes_are_refused():
    with pytest.raises(UserError, match="seed: .*less than 9223372036854775808"):
        tiny(seed=2**63)
    assert tiny(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this computer has Apple's GPU")
def test_a_device_that_is_not_here_is_refused_before_anything_is_trained(root, tmp_path, capsys):
    settings = [f"data_root={root}", *(f"{key}={value}" for key, value in TINY.items() if key != "dataset")]
    (tmp_path / "own.yaml").write_text("dataset: folder\n")
    command = ["train", str(tmp_path / "own.yaml"), *settings, "device=mps", "--quiet", "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("sptseg: device: 'mps' cannot be used (")
    assert not (tmp_path / "run").exists()


def test_devices_by_name():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=rf"^device: '{name}' cannot be used \(.*; use cpu, cuda or mps$"):
            choose_device(name)
    with pytest.raises(UserError, match="device: "):
        tiny(device="tpu")
    assert [*setting_problems(tiny(device="mps", n_proc=2), DIVIDED)] == [
        "n_proc: 2 processes cannot share one Apple GPU; use n_proc=1"
    ]


def test_the_device_may_change_when_a_run_continues_and_is_stored_only_if_given(root, tmp_path):
    changes = {"data_root": str(root), "checkpoint_every": 1, "keep_final_checkpoints": True}
    train(tiny(**changes), tmp_path / "run", progress=False)
    assert "device" not in yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    weights = (tmp_path / "run" / WEIGHTS).read_bytes()
    (tmp_path / "run" / RESULTS).unlink()
    checkpoints(tmp_path / "run")[0].unlink()
    train(tiny(**changes, device="cpu"), tmp_path / "run", progress=False)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["device"] == "cpu"
    assert json.loads((tmp_path / "run" / RESULTS).read_text())["device"] == "cpu"
    if not torch.cuda.is_available():
        assert (tmp_path / "run" / WEIGHTS).read_bytes() == weights
