"""More than 253 classes: 253, 254 and 255 are classes like any other, from the file to the loss and the metrics."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sptseg.core import IGNORE, UserError, ignore_label, unseen_label
from sptseg.data.crops import is_varied
from sptseg.data.files import read_mask
from sptseg.data.folder import folder_labels, folder_samples
from sptseg.data.label_sets import LabelSet, label_to_train_id, raw_lookup, remap_labels, train_class_ids
from sptseg.data.report import report_text, show_report
from sptseg.data.survey import survey
from sptseg.data.transforms import SegmentationData, TrainTransform
from sptseg.evaluation.metrics import SegmentationMetrics
from sptseg.plots import colour_mask, label_palette, show_segmentations
from sptseg.training.losses import pseudo_label, segmentation_loss
from sptseg.training.mask_losses import one_hot_target


def make_labels(count, unseen=(), numbers=()):
    return LabelSet("many", tuple(f"thing {index}" for index in range(count)), unseen=tuple(unseen), numbers=numbers)


@pytest.fixture
def root(tmp_path):
    "300 classes; two images whose masks hold 0..299 and 65535."
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"images/train/{index}.png")
        numbers = (np.arange(2000) % 300).reshape(40, 50).astype(np.uint16)
        numbers[:2] = 65535
        Image.fromarray(numbers).save(tmp_path / f"masks/train/{index}.png")
    content = {"classes": [f"thing {index}" for index in range(300)], "unseen": ["thing 255", "thing 7"]}
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_files_of_16_bits_keep_their_numbers(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / "x.png")
    mask = read_mask(tmp_path / "x.png")
    assert mask.dtype == torch.int32 and np.array_equal(mask, numbers)
    Image.fromarray(numbers.astype(np.uint8)).save(tmp_path / "x.png")
    assert read_mask(tmp_path / "x.png").dtype == torch.uint8


@pytest.mark.parametrize("count", [252, 253, 254, 256, 257, 459, 847])
@pytest.mark.parametrize("setting", ["inductive", "transductive", "supervised"])
def test_no_class_collides_with_a_special_label(count, setting):
    labels = make_labels(count, unseen=(2, count - 1))
    ignore = ignore_label(count)
    numbers = torch.tensor([*range(count), ignore], dtype=torch.uint8 if ignore == IGNORE else torch.int32)
    ids = remap_labels(numbers, raw_lookup(labels))
    assert ids.tolist() == numbers.tolist()
    trained = train_class_ids(labels, setting)
    result = remap_labels(ids, label_to_train_id(labels, setting)).tolist()
    for c in range(count):
        if c in trained and (c not in labels.unseen or setting == "supervised"):
            assert trained[result[c]] == c
        else:
            assert result[c] == (unseen_label(count) if setting == "transductive" else ignore_label(len(trained)))
    assert result[-1] == ignore_label(len(trained))
    with pytest.raises(UserError, match="label 60000 is outside"):
        remap_labels(torch.tensor([60000], dtype=torch.int32), raw_lookup(labels))


def test_255_classes_leave_the_byte_255_free():
    numbers = torch.tensor([0, 253, 254, 255], dtype=torch.uint8)
    assert remap_labels(numbers, raw_lookup(make_labels(255))).tolist() == [0, 253, 254, 65535]


def test_large_numbers_of_few_classes_become_bytes():
    table = raw_lookup(make_labels(3, numbers=(300, 255, 7)))
    mask = torch.tensor([[300, 255, 7, 8, 65535]], dtype=torch.int32)
    assert remap_labels(mask, table).tolist() == [[0, 1, 2, IGNORE, IGNORE]]
    assert remap_labels(mask, table).dtype == torch.uint8
    with pytest.raises(UserError, match="label 301"):
        remap_labels(mask + (mask == 300).int(), table)


def test_files_of_16_bits_in_a_dataset_of_bytes():
    table = raw_lookup(make_labels(5))
    assert remap_labels(torch.tensor([4, 255, 65535], dtype=torch.int32), table).tolist() == [4, IGNORE, IGNORE]
    for wrong in (5, 256, 260, 65534):  # 260 would be class 4 if only its low byte counted
        with pytest.raises(UserError, match=rf"label {wrong} is outside the class list \(0..4"):
            remap_labels(torch.tensor([0, wrong], dtype=torch.int32), table)


def test_a_byte_255_that_may_be_a_class_is_refused():
    table = raw_lookup(make_labels(300))
    assert remap_labels(torch.tensor([0, 254], dtype=torch.uint8), table).tolist() == [0, 254]
    with pytest.raises(UserError, match="m.png: 255 may be a class"):
        remap_labels(torch.tensor([0, 255], dtype=torch.uint8), table, "m.png")
    assert remap_labels(torch.tensor([255], dtype=torch.uint8), raw_lookup(make_labels(2, numbers=(1, 300)))) == IGNORE


def test_crops_keep_wide_labels(root):
    data = folder_samples(root, "train")
    lookup = label_to_train_id(folder_labels(root), "supervised")
    transform = TrainTransform(crop_size=64, image_scale=(40, 200), ratio_range=(1, 1), photometric=False, flip=0.0)
    _, mask, _ = SegmentationData(data, lookup=lookup, transform=transform)[0]
    assert mask.dtype == torch.int32 and torch.equal(mask[:40, :50], data[0].mask)
    assert (mask[40:] == 65535).all() and (mask[:, 50:] == 65535).all() and 255 in mask
    assert is_varied(torch.tensor([[255, 254], [253, 65535]], dtype=torch.int32), 0.75)
    assert not is_varied(torch.tensor([[255, 65534], [65534, 65535]], dtype=torch.int32), 0.75)


@pytest.mark.parametrize("auxiliary", ["ssim", "dice"])
def test_losses_treat_255_as_a_class(auxiliary):
    label = torch.randint(0, 260, (1, 24, 24), generator=torch.Generator().manual_seed(0))
    label[0, 0, :3] = torch.tensor([255, 65535, 254])
    target = one_hot_target(label, 260)
    assert target[0, 255, 0, 0] == 1 and target[0, :, 0, 1].sum() == 0 and target[0, 254, 0, 2] == 1
    logits = torch.randn(1, 260, 24, 24, generator=torch.Generator().manual_seed(1))
    better = logits + 3 * target
    loss, lower = (segmentation_loss(x, label, auxiliary=auxiliary)["focal"] for x in (logits, better))
    assert lower < loss
    order = torch.arange(259, -1, -1)  # renaming classes changes nothing
    renamed = torch.where(label == 65535, label, 259 - label)
    assert torch.allclose(segmentation_loss(logits[:, order], renamed, auxiliary=auxiliary)["loss"],
                          segmentation_loss(logits, label, auxiliary=auxiliary)["loss"], rtol=1e-5)  # fmt: skip


def test_pseudo_labels_replace_the_wide_mark_only():
    label = torch.tensor([[[254, 65534, 65535]]])
    logits = torch.zeros(1, 300, 1, 3)
    logits[:, 280] = 1
    assert pseudo_label(logits, label, unseen=(270, 280)).tolist() == [[[254, 280, 65535]]]


def test_metrics_count_class_255():
    labels, rng = make_labels(300), np.random.default_rng(0)
    truth, guess = rng.integers(250, 262, 4000), rng.integers(250, 262, 4000)
    truth[:100] = 65535
    metrics = SegmentationMetrics(labels)
    metrics.update(torch.from_numpy(guess), torch.from_numpy(truth).int())
    known, scores = truth != 65535, metrics.compute()
    assert scores.pAcc == pytest.approx(100 * (truth == guess)[known].mean())
    for c in (253, 254, 255, 256):
        both, either = ((truth == c) & (guess == c))[known].sum(), ((truth == c) | (guess == c))[known].sum()
        assert scores.iou[f"thing {c}"] == pytest.approx(100 * both / either)


def test_report_and_pictures_of_many_classes(root):
    labels, data = folder_labels(root), folder_samples(root, "train")
    found = survey(labels, data, progress=False)
    masks = np.stack([sample.mask.numpy() for sample in data])
    assert found.pixels.tolist() == [int((masks == c).sum()) for c in range(300)]
    assert found.ignored_share == pytest.approx((masks == 65535).mean()) and "300 classes" in report_text(found)
    assert show_report(found, data, examples=1).axes
    palette = label_palette(labels.classes)
    assert palette.shape == (65536, 3) and (palette[65535] == 255).all() and (palette[255] != 255).any()
    assert np.array_equal(colour_mask(data[0].mask, 300)[1, 5], palette[65535])
    figure = show_segmentations([{"image": data[0].image, "truth": data[0].mask}], labels.classes)
    assert "thing 255" in [text.get_text() for text in figure.legends[0].get_texts()]
