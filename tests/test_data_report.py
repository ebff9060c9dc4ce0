"""The survey of a dataset: right counts, warnings where something is wrong, names where the classes are."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from sptseg.core import IGNORE, UserError  # noqa: E402
from sptseg.data.files import FileSamples  # noqa: E402
from sptseg.data.label_sets import LabelSet, load_label_set, raw_lookup
from sptseg.data.report import name_places, pick_examples, report_text, show_report  # noqa: E402
from sptseg.data.survey import early_warnings, evenly, report_warnings, survey  # noqa: E402
from sptseg.data.transforms import Sample  # noqa: E402

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
LABELS = LabelSet("four", ("sky", "cat", "tree", "car"), unseen=(1, 3))


class Drawn:
    "Samples with random masks, of different sizes; can be asked for any change of the mask."

    def __init__(self, count=12, classes=4, change=lambda mask, index: mask):
        self.count, self.classes, self.change = count, classes, change

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        size = (20 + index % 3, 30)
        mask = torch.randint(0, self.classes, size, generator=generator, dtype=torch.uint8)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        return Sample(image, self.change(mask, index), f"drawn {index}")


class Broken(Drawn):
    def __getitem__(self, index):
        if index in (2, 3):
            raise UserError(f"{index}.png: is broken")
        return super().__getitem__(index)


def without(*classes):
    return lambda mask, index: torch.where(torch.isin(mask, torch.tensor(classes)), IGNORE, mask)


def quiet(labels, data, **options):
    return survey(labels, data, progress=False, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_equal_those_of_numpy(workers):
    data = Drawn(40, change=lambda mask, index: torch.where(mask == index % 5, IGNORE, mask))
    found, masks = quiet(LABELS, data, workers=workers), [data[index].mask.numpy() for index in range(40)]
    everything = np.concatenate([mask.ravel() for mask in masks])
    assert found.pixels.tolist() == [(everything == c).sum() for c in range(4)]
    assert found.images.tolist() == [sum((mask == c).any() for mask in masks) for c in range(4)]
    assert found.share.sum() == pytest.approx(1)
    assert found.ignored_share == pytest.approx((everything == IGNORE).mean())
    assert found.ignored == pytest.approx([(mask == IGNORE).mean() for mask in masks])
    assert found.sizes.tolist() == [list(mask.shape) for mask in masks] and found.total == 40


@pytest.mark.parametrize(("count", "wanted"), [(10, 3), (10, 10), (10, 99), (7, 1), (118_287, 5000), (0, None)])
def test_a_part_is_spread_evenly(count, wanted):
    indices = evenly(count, wanted)
    assert len(indices) == min(count, wanted or count) and indices == sorted(set(indices))
    steps = np.diff([*indices, count])
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_a_part_of_the_images_is_surveyed():
    found = quiet(LABELS, Drawn(12), images=4)
    assert len(found.sizes) == 4 and found.total == 12 and set(found.example.tolist()) <= {0, 3, 6, 9}
    with pytest.raises(UserError, match="images: 0"):
        quiet(LABELS, Drawn(12), images=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_listed_and_the_others_counted(workers):
    found = quiet(LABELS, Broken(6), workers=workers)
    assert found.problems == ("2.png: is broken", "3.png: is broken") and len(found.sizes) == 4
    assert report_warnings(found)[0] == "2 of 6 samples cannot be used; the first: 2.png: is broken"


def test_labels_beyond_the_list_and_wrong_forms_are_unusable():
    found = quiet(LABELS, Drawn(4, change=lambda mask, index: mask + 2 * (index == 1)))
    assert len(found.problems) == 1 and "drawn 1: labels 4, 5 are outside the class list" in found.problems[0]
    found = quiet(LABELS, Drawn(4, change=lambda mask, index: mask[index == 1 :]))
    assert len(found.problems) == 1 and "drawn 1: the mask has shape" in found.problems[0]


def test_nothing_usable_is_an_error():
    with pytest.raises(UserError, match="no sample can be used: drawn 0: label"):
        quiet(LABELS, Drawn(3, change=lambda mask, index: mask + 100))
    with pytest.raises(UserError, match="the dataset is empty"):
        quiet(LABELS, Drawn(0))


def test_good_data_get_no_warning():
    assert report_warnings(quiet(LABELS, Drawn())) == [] and "no warnings" in report_text(quiet(LABELS, Drawn()))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (without(1), "1 of 2 unseen classes never occur: cat"),
        (without(2), "1 of 2 seen classes never occur: tree"),
        (without(0), "the first class of the list, 'sky', never occurs: labels shifted by one"),
        (without(3), "the last class of the list, 'car', never occurs: labels shifted by one"),
        (without(0, 1, 2), "75% of all pixels have no label"),
        (lambda mask, index: mask.fill_(IGNORE) if index == 5 else mask, "1 of 12 images have no labelled pixel"),
        (lambda mask, index: torch.where(mask == 3, 1, mask.clamp(max=1)), "'cat' takes 7"),
    ],
)
def test_each_warning_appears(change, warning):
    found = quiet(LABELS, Drawn(change=change))
    assert any(line.startswith(warning) or warning in line for line in report_warnings(found))
    assert f"WARNING: {report_warnings(found)[0]}" in report_text(found) and all(
        map(str.isprintable, report_warnings(found))
    )


def test_background_that_is_no_class_may_fill_most_of_a_image():
    change = lambda mask, index: torch.where(mask.roll(1) == 0, mask, IGNORE)  # noqa: E731
    assert any("have no label" in line for line in report_warnings(quiet(LABELS, Drawn(change=change))))
    voc_like = LabelSet("four", LABELS.classes, unseen=(1,), numbers=(1, 2, 3, 4))
    assert report_warnings(quiet(voc_like, Drawn(change=change))) == []


def test_images_rotated_by_their_exif_orientation_are_counted(tmp_path):
    for index in range(4):
        exif = Image.Exif()
        exif[0x0112] = 3 if index % 2 else 1
        Image.fromarray(Drawn()[0].image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.jpg", exif=exif)
        Image.fromarray(Drawn()[0].mask.numpy()).save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.jpg" for index in range(4)]
    data = FileSamples(images=paths, masks=[path.with_suffix(".png") for path in paths])
    assert any(line.startswith("2 of 4 images are rotated") for line in report_warnings(quiet(LABELS, data)))
    assert any(line.startswith("1 of 2 images") for line in report_warnings(quiet(LABELS, Subset(data, [1, 2]))))
    assert report_warnings(quiet(LABELS, Subset(data, [0, 2]))) == []


@pytest.mark.parametrize("numbers", [(), (1, 2)])
def test_masks_of_0_and_255_are_recognised(numbers):
    labels = LabelSet("two", ("ground", "dog"), numbers=numbers)
    change = lambda mask, index: torch.where(mask < 2, IGNORE if numbers else 0, IGNORE).byte()  # noqa: E731
    found = quiet(labels, Drawn(classes=4, change=change))
    assert report_warnings(found)[0].startswith("all masks hold 0 and 255 only")
    assert early_warnings(labels, Drawn(classes=4, change=change), images=3)[0].startswith("all masks hold 0 and 255")
    some = lambda mask, index: torch.where(mask < 2, 0, 1 if index == 7 else IGNORE).byte()  # noqa: E731
    assert not any(
        "0 and 255" in line for line in report_warnings(quiet(LabelSet("two", ("a", "b")), Drawn(change=some)))
    )


def test_early_warnings_look_at_few_images_and_draw_no_random_numbers():
    class Counted(Drawn):
        asked = []

        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    data = Counted(100, change=without(1))
    assert early_warnings(LABELS, data, images=10) == [] and len(data.asked) == 10
    assert torch.equal(torch.get_rng_state(), state), "a training that is warned stays the same"
    assert any("never occur" in line for line in early_warnings(LABELS, Drawn(10, change=without(1))))


def test_a_part_of_the_dataset_is_said_to_be_a_part():
    found = quiet(LABELS, Drawn(change=without(1)), images=3)
    assert any("never occur in 3 of 12 images: cat" in line for line in report_warnings(found))


def test_text_has_a_line_for_every_class():
    lines = report_text(quiet(LABELS, Drawn())).splitlines()
    for index, name in enumerate(("sky", "cat *", "tree", "car *")):
        assert any(line.startswith(f"   {index}  {name} ") for line in lines)


def test_examples_show_the_class_they_stand_for():
    change = lambda mask, index: torch.where(mask == index % 4, mask, 0 if index % 4 else IGNORE)  # noqa: E731
    data = Drawn(8, change=change)
    found = quiet(LABELS, data)
    for count in (1, 2, 3, 4, 9):
        picked = pick_examples(found, count)
        assert len(picked) == len({index for _, index in picked}) == min(count, len(set(found.example)))
        assert all((data[index].mask == c).any() for c, index in picked)
        assert picked[0][0] in LABELS.unseen


def test_a_class_that_fills_its_only_image_is_found():
    data = Drawn(3, change=lambda mask, index: mask.fill_(3) if index == 2 else mask.clamp(max=2))
    assert quiet(LABELS, data).example[3] == 2


def test_names_are_written_inside_their_regions():
    mask = np.full((40, 60), IGNORE, np.uint8)
    rows, cols = np.indices(mask.shape)
    mask[((rows - 20) ** 2 + (cols - 20) ** 2 < 300) & ((rows - 20) ** 2 + (cols - 20) ** 2 > 150)] = 5  # a ring
    mask[:3, 40:] = 7
    mask[39, 59] = 9  # a single pixel
    places = name_places(mask, 20)
    assert set(places) == {5, 7} and all(mask[place] == c for c, place in places.items())


@pytest.mark.parametrize("name", ["voc", "coco-stuff", None])
def test_figures_of_any_number_of_classes(name, tmp_path):
    labels = load_label_set(name) if name else LabelSet("one", ("thing",))
    data = Drawn(5, classes=len(labels.classes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = show_report(quiet(labels, data), data, examples=3)
        figure.savefig(tmp_path / "report.png")
    shown = {label.get_text().split("  ")[0] for axis in figure.get_axes() for label in axis.get_yticklabels()}
    assert set(labels.classes) <= shown
    plt.close(figure)


@pytest.mark.skipif(not SAMPLES.exists(), reason="sample images and masks are not here")
def test_a_shift_of_real_labels_is_visible_by_name():
    labels, folder = load_label_set("voc"), SAMPLES / "voc2012"
    files = dict(images=[folder / "JPEGImages/2010_005788.jpg"], masks=[folder / "SegmentationClass/2010_005788.png"])
    right = raw_lookup(labels)
    shifted = torch.cat([right[:1], right[:20], right[21:]])  # number k is class k - 2
    for lookup, name in ((right, "sheep *"), (shifted, "pottedplant *")):
        data = FileSamples(**files, lookup=lookup)
        figure = show_report(quiet(labels, data), data)
        written = {text.get_text() for axis in figure.get_axes() for text in axis.texts}
        assert name in written and len({"sheep *", "pottedplant *"} & written) == 1
        plt.close(figure)
