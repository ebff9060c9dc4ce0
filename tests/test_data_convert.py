"""Own annotations in COCO's panoptic format and in YOLO's become masks of class numbers."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sptseg.cli import main
from sptseg.core import IGNORE, UserError
from sptseg.data.convert import convert_panoptic, convert_yolo, polygon_area, read_polygons
from sptseg.data.folder import folder_labels, folder_samples

CATEGORIES = {3: "cat", 90: "dog", 200: "grass-merged"}


def refusal(function, *arguments, **options):
    with pytest.raises(UserError) as error:
        function(*arguments, **options, **({} if "progress" in options else {"progress": False}))
    assert "\n" not in str(error.value)
    return str(error.value)


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_panoptic(folder, categories=CATEGORIES, count=3):
    "Random segments with large ids; returns the JSON file and the true masks."
    rng, annotations, truths = np.random.default_rng(0), [], []
    for index in range(count):
        save_image(folder / f"images/{index}.jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        ids = rng.choice([0, 1, 255, 256, 65_536, 2**24 - 1], size=(20, 30))
        kinds = {int(i): int(rng.choice(list(categories))) for i in np.unique(ids) if i}
        truths.append(np.vectorize(lambda i, kinds=kinds: kinds.get(i, -1))(ids))
        save_image(
            folder / f"panoptic/{index}.png", np.stack([ids >> 8 * c & 255 for c in range(3)], 2).astype(np.uint8)
        )
        segments = [{"id": i, "category_id": c, "area": 1, "iscrowd": 0} for i, c in kinds.items()]
        annotations.append({"image_id": 10 + index, "file_name": f"{index}.png", "segments_info": segments})
    content = {
        "images": [{"id": 10 + index, "file_name": f"{index}.jpg"} for index in range(count)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "isthing": 1} for i, name in categories.items()],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder / "panoptic.json", truths


@pytest.fixture
def yolo(tmp_path):
    "Two squares, one on the other, in train; an index mask in val; class numbers 0 and 5."
    for split in ("train", "val"):
        save_image(tmp_path / f"set/images/{split}/sub/a.png", np.zeros((40, 80, 3), np.uint8))
    label = tmp_path / "set/labels/train/sub/a.txt"
    label.parent.mkdir(parents=True)
    label.write_text("5 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75\n\n0 0 0 1 0 1 1 0 1\n")
    mask = np.full((40, 80), 255, np.uint8)
    mask[:, :7] = 5
    save_image(tmp_path / "set/masks/val/sub/a.png", mask)
    names = {"names": {0: "ground", 5: "red cat"}, "train": "images/train", "val": ["images/val"], "nc": 2}
    (tmp_path / "set/config.yaml").write_text(yaml.safe_dump(names))
    return tmp_path / "set/config.yaml"


def test_panoptic_masks_hold_categories(tmp_path):
    path, truths = make_panoptic(tmp_path)
    assert convert_panoptic(path, tmp_path / "own", images=tmp_path / "images", progress=False) == {"train": 3}
    labels, data = folder_labels(tmp_path / "own"), folder_samples(tmp_path / "own", "train")
    assert labels.classes == tuple(CATEGORIES.values()) and labels.numbers == tuple(CATEGORIES)
    for index, truth in enumerate(truths):
        ids = [CATEGORIES[c] if c >= 0 else None for c in truth.ravel()]
        read = [labels.classes[c] if c != IGNORE else None for c in data[index].mask.flatten().tolist()]
        assert read == ids
        assert (tmp_path / f"own/images/train/{index}.jpg").read_bytes() == (
            tmp_path / f"images/{index}.jpg"
        ).read_bytes()
    for note in (tmp_path / "own").rglob("*.tmp"):
        raise AssertionError(note)


def test_large_numbers_make_masks_of_16_bits(tmp_path):
    path, truths = make_panoptic(tmp_path, {255: "a", 7: "b", 4000: "c"})
    convert_panoptic(path, tmp_path / "own", images=tmp_path / "images", split="val", progress=False)
    data = folder_samples(tmp_path / "own", "val")
    for truth, sample in zip(truths, data, strict=True):
        expected = np.select([truth == 255, truth == 7, truth == 4000], [0, 1, 2], IGNORE)
        assert np.array_equal(sample.mask, expected)


def test_a_conversion_goes_on_where_it_stopped(tmp_path):
    path, _ = make_panoptic(tmp_path)
    options = {"images": tmp_path / "images", "progress": False}
    broken = tmp_path / "panoptic/2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    assert refusal(convert_panoptic, path, tmp_path / "own", **options).startswith(str(broken))
    masks = tmp_path / "own/masks/train"
    assert sorted(file.name for file in masks.iterdir()) == ["0.png", "1.png"]
    broken.write_bytes(whole)
    before = (masks / "0.png").stat().st_mtime_ns
    assert convert_panoptic(path, tmp_path / "own", **options) == {"train": 3}
    assert (masks / "0.png").stat().st_mtime_ns == before and (masks / "2.png").exists()
    later = os.stat(masks / "1.png").st_mtime + 10
    os.utime(tmp_path / "panoptic/1.png", (later, later))
    save_image(masks / "1.png", np.zeros((20, 30), np.uint8))
    convert_panoptic(path, tmp_path / "own", **options)
    assert (np.asarray(Image.open(masks / "1.png")) > 0).any(), "a changed annotation is converted again"


def test_two_sources_never_mix(tmp_path):
    path, _ = make_panoptic(tmp_path)
    options = {"images": tmp_path / "images"}
    convert_panoptic(path, tmp_path / "own", **options, progress=False)
    convert_panoptic(path, tmp_path / "own", **options, split="val", progress=False)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": content["annotations"][:2]}))
    assert "another source" in refusal(convert_panoptic, path, tmp_path / "own", **options)
    content["categories"][0]["name"] = "lion"
    path.write_text(json.dumps(content))
    assert "other classes" in refusal(convert_panoptic, path, tmp_path / "own", **options)
    save_image(tmp_path / "mine/images/train/x.png", np.zeros((4, 4, 3), np.uint8))
    assert "another source" in refusal(convert_panoptic, path, tmp_path / "mine", **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("categories"), "lacks the lists"),
        (lambda c: c["annotations"][0].pop("segments_info"), "without segments_info"),
        (lambda c: c["annotations"][0].pop("file_name"), "'file_name'"),
        (lambda c: c["annotations"][1].update(image_id=99), "99"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id=4), "category 4 is used but not listed"),
        (lambda c: c["images"][2].update(file_name="no.jpg"), "this image does not exist (1 of 3"),
        (lambda c: c["categories"][1].update(name="cat"), "the same name"),
        (lambda c: c["categories"][1].update(name=""), "is empty"),
    ],
)
def test_faulty_json_files_are_named_before_anything_is_written(tmp_path, change, reason):
    path, _ = make_panoptic(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert reason in refusal(convert_panoptic, path, tmp_path / "own", images=tmp_path / "images")
    assert not (tmp_path / "own/images").exists()


def test_segments_that_are_not_listed_name_the_png(tmp_path):
    path, _ = make_panoptic(tmp_path)
    save_image(tmp_path / "panoptic/1.png", np.full((20, 30, 3), 9, np.uint8))
    text = refusal(convert_panoptic, path, tmp_path / "own", images=tmp_path / "images")
    assert text.startswith(f"{tmp_path / 'panoptic/1.png'}: segment {9 + 9 * 256 + 9 * 65536}")


def test_polygons_and_index_masks_of_yolo(yolo, tmp_path):
    assert convert_yolo(yolo, tmp_path / "own", progress=False) == {"train": 1, "val": 1}
    labels, train = folder_labels(tmp_path / "own"), folder_samples(tmp_path / "own", "train")
    assert labels.classes == ("ground", "red cat") and train[0].name == "sub/a"
    expected = torch.zeros(40, 80, dtype=torch.uint8)
    expected[10:30, 20:40] = 1
    assert (train[0].mask != expected).float().mean() < 0.03, "at most the outline differs by a pixel"
    val = folder_samples(tmp_path / "own", "val")[0].mask
    assert (val[:, :7] == 1).all() and (val[:, 7:] == IGNORE).all()


def test_a_missing_label_file_means_no_label(yolo, tmp_path):
    save_image(yolo.parent / "images/train/b.png", np.zeros((10, 10, 3), np.uint8))
    convert_yolo(yolo, tmp_path / "own", progress=False)
    assert (folder_samples(tmp_path / "own", "train")[0].mask == IGNORE).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"names": ["a"]}, "lacks train and val"),
        ({"train": "images/train"}, "lacks names"),
        ({"names": ["a", "a"], "train": "images/train"}, "the same name"),
        ({"names": ["a"], "train": "nowhere"}, "is not a folder"),
        ({"names": {0: "ground"}, "train": "images/train"}, "class 5 is not among `names`"),
        ({"names": {0: "ground", 4: "b"}, "val": "images/val"}, "number 5 is not among `names`"),
    ],
)
def test_faulty_configurations_are_named(yolo, tmp_path, content, reason):
    yolo.write_text(yaml.safe_dump(content))
    assert reason in refusal(convert_yolo, yolo, tmp_path / "own")


@pytest.mark.parametrize("seed", range(5))
def test_areas_of_polygons(seed):
    angles = np.sort(np.random.default_rng(seed).uniform(0, 2 * np.pi, 7))
    corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
    assert polygon_area(corners) == pytest.approx(0.5 * np.sin(gaps).sum(), abs=1e-9)
    assert polygon_area(corners[::-1] + 5) == pytest.approx(polygon_area(corners))


def test_lines_that_are_no_polygons_are_named(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("")
    assert read_polygons(file, (0,)) == []
    for line, reason in [("0 .1 .2 .3 .4", "is a box"), ("0 1 1 0", "3 coordinates"), ("x 0 0 1 1 0 1", "else than")]:
        file.write_text(f"0 0 0 1 0 1 1\n{line}\n")
        with pytest.raises(UserError, match=reason) as error:
            read_polygons(file, (0,))
        assert str(error.value).startswith(f"{file}: line 2")


def test_the_command_converts_both_formats(yolo, tmp_path, capsys):
    path, _ = make_panoptic(tmp_path)
    more = ["--workers", "1", "--quiet"]
    assert main(["data", "convert", str(yolo), "--root", str(tmp_path / "y"), *more]) == 0
    assert main(["data", "convert", str(path), "--root", str(tmp_path / "p"), *more]) == 1
    assert "add --images DIR" in capsys.readouterr().err
    arguments = ["--images", str(tmp_path / "images"), "--split", "val", *more]
    assert main(["data", "convert", str(path), "--root", str(tmp_path / "p"), *arguments]) == 0
    assert "val 3" in capsys.readouterr().out and len(folder_samples(tmp_path / "p", "val")) == 3
