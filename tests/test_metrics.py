"""Metrics against a plain re-implementation, and the rules for absent classes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from sptseg.core import IGNORE, UserError
from sptseg.data.label_sets import LabelSet, load_label_set
from sptseg.evaluation.metrics import SegmentationMetrics, class_iou, harmonic_mean, pixel_accuracy, scores_from_matrix

TOY = LabelSet("toy", ("a", "b", "c", "d"), unseen=(1, 3))


def random_maps(seed, classes=4, images=5, ignored=0.1):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (images, 30, 41), generator=generator)
    prediction = torch.where(torch.rand(label.shape, generator=generator) < 0.5, label, label.flip(1) * 0 + 2)
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORE
    return prediction, label


def measured(label_set, prediction, label):
    metrics = SegmentationMetrics(label_set)
    metrics.update(prediction, label)
    return metrics.compute()


def by_hand(label_set, prediction, label):
    "The definitions, one class at a time, with numpy."
    prediction, label = prediction.numpy()[label.numpy() != IGNORE], label.numpy()[label.numpy() != IGNORE]
    iou = []
    for index in range(len(label_set.classes)):
        union = np.sum((prediction == index) | (label == index))
        iou.append(100 * np.sum((prediction == index) & (label == index)) / union if union else np.nan)
    seen = np.nanmean([iou[index] for index in label_set.seen])
    unseen = np.nanmean([iou[index] for index in label_set.unseen])
    return 100 * np.mean(prediction == label), seen, unseen, 2 * seen * unseen / (seen + unseen), iou


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["toy", "voc", "coco-stuff"])
def test_numbers_equal_a_plain_reimplementation(seed, name):
    labels = TOY if name == "toy" else load_label_set(name)
    maps = random_maps(seed, len(labels.classes))
    scores, expected = measured(labels, *maps), by_hand(labels, *maps)
    assert (scores.pAcc, scores.miou_seen, scores.miou_unseen, scores.hiou) == pytest.approx(expected[:4], abs=1e-10)
    assert list(scores.iou.values()) == pytest.approx(expected[4], abs=1e-10, nan_ok=True)


def test_deterministic_mode_neither_changes_counts_nor_needs_pixels_times_cells_of_memory():
    """Deterministic counting compares every pixel with each of 171² cells."""
    prediction, label = random_maps(0, 171)
    expected, sizes = measured(load_label_set("coco-stuff"), prediction, label), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    torch.use_deterministic_algorithms(True)
    try:
        with Sizes():
            assert measured(load_label_set("coco-stuff"), prediction, label) == expected
        assert torch.are_deterministic_algorithms_enabled(), "the mode is left as it was"
    finally:
        torch.use_deterministic_algorithms(False)
    assert max(sizes) < 10 * (label.numel() + 171**2)


def test_counting_in_parts_in_any_order_equals_counting_at_once():
    prediction, label = random_maps(1)
    parts = SegmentationMetrics(TOY)
    for index in (3, 0, 4, 2, 1):
        parts.update(prediction[index], label[index].to(torch.uint8))
    assert parts.compute() == measured(TOY, prediction, label)


def test_ignored_pixels_do_not_count_whatever_is_predicted_there():
    prediction, label = random_maps(2)
    other = torch.where(label == IGNORE, (prediction + 1) % 4, prediction)
    assert measured(TOY, prediction, label) == measured(TOY, other, label)


def test_absent_classes_are_left_out_and_wrongly_predicted_ones_are_zero():
    label = torch.tensor([0, 0, 1, 1])
    scores = measured(TOY, torch.tensor([0, 0, 1, 1]), label)
    assert math.isnan(scores.iou["c"]) and math.isnan(scores.iou["d"])
    assert scores.miou_seen == scores.miou_unseen == scores.hiou == 100
    scores = measured(TOY, torch.tensor([0, 0, 1, 3]), label)
    assert scores.iou["d"] == 0 and scores.miou_unseen == 25


def test_no_unseen_class_means_not_available():
    scores = measured(LabelSet("all", ("a", "b")), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert scores.miou_unseen is None and scores.hiou is None and scores.miou_seen == 100


def test_no_labelled_pixel_gives_no_number():
    result = measured(TOY, torch.tensor([0, 1]), torch.tensor([IGNORE, IGNORE])).as_dict()
    assert [result[key] for key in ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "mIoU")] == [None] * 5


def test_results_fit_json():
    import json

    text = json.dumps(measured(TOY, torch.tensor([0]), torch.tensor([0])).as_dict(), allow_nan=False)
    assert json.loads(text)["IoU"] == {"a": 100.0, "b": None, "c": None, "d": None}


def test_harmonic_mean():
    assert harmonic_mean(92.9, 87.4) == pytest.approx(90.07, abs=0.01)
    assert harmonic_mean(0.0, 0.0) == 0 and harmonic_mean(90.0, 0.0) == 0
    assert math.isnan(harmonic_mean(math.nan, 50.0))


def test_large_counts_are_exact():
    matrix = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    assert class_iou(matrix).dtype == torch.float64
    assert pixel_accuracy(matrix) == (2**41 + 1) / (2**41 + 2)
    assert scores_from_matrix(matrix, LabelSet("two", ("a", "b"))).pAcc < 100


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [([0, 0], [0, 4], "label 4 is outside"), ([4, 0], [0, 0], "prediction 4"), ([-1, 0], [0, 0], "prediction -1")],
)
def test_ids_outside_the_class_list_are_refused_and_not_counted(prediction, label, message):
    metrics = SegmentationMetrics(TOY)
    with pytest.raises(UserError, match=message):
        metrics.update(torch.tensor(prediction), torch.tensor(label))
    assert metrics.confusion.confmat.sum() == 0


def test_sizes_must_agree():
    with pytest.raises(UserError, match=r"prediction is \(2, 3\), label \(3, 2\)"):
        SegmentationMetrics(TOY).update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))


def count_in_a_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    prediction, label = random_maps(3)
    metrics = SegmentationMetrics(TOY)
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    metrics.update(prediction[part], label[part])
    torch.save(metrics.compute().as_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_on_the_result_of_all_images(tmp_path):
    mp.spawn(count_in_a_process, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0] == results[1] == measured(TOY, *random_maps(3)).as_dict()


def test_one_class_is_enough():
    label = torch.tensor([[0, 0, IGNORE]])
    scores = measured(LabelSet("one", ("cat",)), torch.zeros_like(label), label).as_dict()
    assert scores["mIoU"] == scores["pAcc"] == 100 and scores["hIoU"] is None
