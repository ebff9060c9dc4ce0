"""What an evaluation keeps besides its metrics: predictions, confusion and the worst images."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sptseg.cli import main
from sptseg.data.benchmarks import Benchmark
from sptseg.data.label_sets import LabelSet
from sptseg.data.transforms import Sample
from sptseg.evaluation.details import EvaluationDetails, confusion_table
from sptseg.evaluation.evaluate import load_parts, training_free_predictor
from sptseg.plots import show_segmentations
from sptseg.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_keeps_what_it_evaluated(tmp_path):
    settings = ["iterations=2", "eval_every=2", "val_images=3", "train_images=4"]
    assert main(["train", "demo/smoke", "--quiet", *settings, "--out", str(tmp_path / "run")]) == 0
    folder = tmp_path / "details"
    assert main(["evaluate", str(tmp_path / "run"), "--quiet", "--details", str(folder)]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation-glyphs-20.json").read_text())["metrics"]
    benchmark, _, _ = load_parts(load_recipe(tmp_path / "run" / "recipe.yaml"), training=False)
    right = known = 0
    for index in range(3):
        sample = benchmark.val[index]
        mask = np.array(Image.open(folder / "predictions" / f"{sample.name}.png"))
        valid = sample.mask.numpy() != 255
        right, known = right + (mask == sample.mask.numpy())[valid].sum(), known + valid.sum()
    assert 100 * right / known == pytest.approx(metrics["pAcc"])
    table = pd.read_csv(folder / "confusion.csv", index_col=0)
    sums = table.sum(axis=1)
    assert table.shape == (20, 20) and np.allclose(sums[sums > 0], 100)
    assert {path.name for path in folder.iterdir()} >= {"confusion.png", "worst.png", "images.csv"}


def test_the_worst_images_are_those_of_the_lowest_accuracy(tmp_path):
    labels = LabelSet("two", ("cat", "dog"))
    details = EvaluationDetails(tmp_path, labels)
    truth = torch.zeros(4, 5, dtype=torch.uint8)
    for name, wrong in (("good", 0), ("bad", 15), ("middle", 5)):
        prediction = truth.clone().view(-1)
        prediction[:wrong] = 1
        details.add(name, prediction.view(4, 5), truth)
    details.add("empty", truth, torch.full_like(truth, 255))
    assert details.worst(2) == [1, 2] and details.worst(9) == [1, 2, 0]
    assert confusion_table(details.counts, labels.classes).loc["cat", "dog"] == pytest.approx(100 * 20 / 60)
    samples = [Sample(torch.zeros(3, 4, 5, dtype=torch.uint8), truth, row["image"]) for row in details.rows]
    details.finish(Benchmark(labels, None, samples), worst=2)
    assert pd.read_csv(tmp_path / "images.csv")["pixel accuracy, %"].isna().tolist() == [False, False, False, True]


def test_predictions_can_be_shown_without_true_labels():
    recipe = load_recipe("demo/spt-seg", val_images=1)
    benchmark, clip, text = load_parts(recipe, training=False)
    image = benchmark.val[0].image
    predict = training_free_predictor(clip.visual, text)
    labels = predict(torch.randn(1, 3, 96, 96), (96, 96))
    figure = show_segmentations([{"image": image, "prediction": labels}], benchmark.labels.classes)
    assert len(figure.axes) == 2
