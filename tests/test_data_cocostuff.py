"""COCO-Stuff 164K: archives of the official layout become the right labels, or a message names what is wrong."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sptseg.core import IGNORE, UserError
from sptseg.data import cocostuff
from sptseg.data.cocostuff import (
    COCO_MASK_ARCHIVE,
    ID_SUFFIX,
    cocostuff_samples,
    list_names,
    place_cocostuff,
    prepare_cocostuff,
)
from sptseg.data.label_sets import load_label_set
from sptseg.data.miniatures import encode, write_archive, write_cocostuff_archives

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "cocostuff164k"
GAPS = np.array([11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90])
USED = [number for number in range(182) if number not in GAPS]
NAMES = {"train2017": ["000000000009", "000000000025", "000000000030"], "val2017": ["000000000139", "000000000285"]}


def drawn(name, size=(24, 32)):
    """An image, and a mask of blocks of numbers that its name decides; a tenth is unlabelled."""
    rng = np.random.default_rng(int(name))
    blocks = rng.choice([*USED, *[IGNORE] * 17], (size[0] // 4, size[1] // 4)).astype(np.uint8)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.kron(blocks, np.ones((4, 4), np.uint8))


def write_archives(root, names=NAMES):
    """The three official archives with drawn images."""
    scenes = {f"{folder}/{name}": drawn(name) for folder, listed in names.items() for name in listed}
    images = {name: encode(image, "jpeg") for name, (image, _) in scenes.items()}
    write_cocostuff_archives(root, images, {name: encode(mask) for name, (_, mask) in scenes.items()})
    return root


def prepare(root, **options):
    return prepare_cocostuff(root, **{"partial": True, "progress": False, **options})


def expected_ids(numbers):
    """Class ids by counting the gaps below each number."""
    ids = numbers.astype(int) - np.searchsorted(GAPS, numbers)
    return np.where(numbers == IGNORE, IGNORE, ids).astype(np.uint8)


def refused(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def root(tmp_path):
    return write_archives(tmp_path / "cocostuff")


@pytest.fixture
def complete(monkeypatch):
    """Let the five drawn images be the complete dataset."""
    monkeypatch.setattr(cocostuff, "COCO_COUNTS", {"train": 3, "val": 2})
    archives = {split: replace(archive, digest=None) for split, archive in cocostuff.COCO_IMAGE_ARCHIVES.items()}
    monkeypatch.setattr(cocostuff, "COCO_IMAGE_ARCHIVES", archives)


def test_prepared_labels_are_those_of_the_archive(root):
    assert prepare(root) == {"train": 3, "val": 2}
    for split in ("train", "val"):
        samples = cocostuff_samples(root, split)
        assert [sample.name for sample in samples] == NAMES[f"{split}2017"]
        for sample in samples:
            assert np.array_equal(sample.mask, expected_ids(drawn(sample.name)[1]))
            jpeg = np.asarray(Image.open(io.BytesIO(encode(drawn(sample.name)[0], "jpeg"))))
            assert np.array_equal(sample.image.permute(1, 2, 0), jpeg)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not there")
def test_real_samples(tmp_path):
    kinds = {"images": "*.jpg", "annotations": "*.png"}
    found = {kind: sorted((SAMPLES / kind).rglob(ending)) for kind, ending in kinds.items()}
    images, masks = ({f"{p.parent.name}/{p.stem}": p.read_bytes() for p in found[kind]} for kind in kinds)
    write_cocostuff_archives(tmp_path, images, masks)
    assert prepare(tmp_path) == {"train": 13, "val": 4}
    classes = load_label_set("coco-stuff").classes
    for split in ("train", "val"):
        for sample in cocostuff_samples(tmp_path, split):
            raw = np.asarray(Image.open(SAMPLES / f"annotations/{split}2017/{sample.name}.png"))
            assert np.array_equal(sample.mask, expected_ids(raw))
            if sample.name == "000000000139":  # a living room with a person, chairs and a television
                assert {"person", "chair", "tv"} <= {classes[i] for i in sample.mask.unique().tolist() if i != IGNORE}


def test_complete_dataset_needs_no_partial_and_no_archive_afterwards(root, complete):
    assert prepare(root, partial=False) == {"train": 3, "val": 2}
    for path in [*root.glob("*.zip"), *root.glob("annotations/*/*[0-9].png")]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert prepare(root, partial=False) == {"train": 3, "val": 2}
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_what_is_missing_is_made_again_and_nothing_else(root, complete):
    prepare(root, partial=False)
    lost = [root / "images/train2017/000000000025.jpg", root / f"annotations/val2017/000000000285{ID_SUFFIX}"]
    contents = [path.read_bytes() for path in lost]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*g") if path not in lost}
    for path in lost:
        path.unlink()
    assert prepare(root, partial=False) == {"train": 3, "val": 2}
    assert contents == [path.read_bytes() for path in lost]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_run_again(tmp_path, workers):
    names = {"train2017": [f"{number:012d}" for number in range(1, 401)], "val2017": NAMES["val2017"]}
    masks = {f"{f}/{name}": drawn(name, (160, 200))[1] for f, listed in names.items() for name in listed}
    root, image = tmp_path / "cocostuff", encode(np.zeros((160, 200, 3), np.uint8), "jpeg")
    write_cocostuff_archives(root, dict.fromkeys(masks, image), {name: encode(mask) for name, mask in masks.items()})
    call = f"prepare_cocostuff({str(root)!r}, partial=True, workers={workers}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", f"from sptseg.data.cocostuff import *; {call}"], cwd=tmp_path)
    folder = root / "annotations/train2017"
    while not list_names(folder, ID_SUFFIX):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers end with their parent
    assert 0 < len(done := list_names(folder, ID_SUFFIX)) < 400
    early = {name: (folder / f"{name}{ID_SUFFIX}").stat().st_mtime_ns for name in done}
    assert prepare(root) == {"train": 400, "val": 2}
    assert early == {name: (folder / f"{name}{ID_SUFFIX}").stat().st_mtime_ns for name in done}, (
        "finished ones are kept"
    )
    for name, mask in masks.items():
        converted = np.asarray(Image.open(root / "annotations" / f"{name}{ID_SUFFIX}"))
        assert np.array_equal(converted, expected_ids(mask)), name


@pytest.mark.parametrize("number", [11, 90, 182, 200, 254])
def test_number_that_no_mask_may_hold(root, number):
    mask = drawn("000000000285")[1]
    mask[3, 5:9] = number
    files = {f"{f}/{n}.png": encode(drawn(n)[1]) for f, listed in NAMES.items() for n in listed}
    write_archive(root / COCO_MASK_ARCHIVE.name, files | {"val2017/000000000285.png": encode(mask)})
    message = refused(prepare, root)
    assert "annotations/val2017/000000000285.png: 4 of 768 pixels" in message and f"hold {number}," in message
    assert not (root / f"annotations/val2017/000000000285{ID_SUFFIX}").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (encode(np.zeros((24, 32, 3), np.uint8)), "3 channels"),
        (encode(np.full((24, 32), 300, np.uint16)), "300"),
        (encode(drawn("000000000139")[1])[:-40], "incomplete"),
        (b"not an image", "not an image"),
    ],
)
def test_file_that_is_no_mask_is_named(root, content, reason):
    files = {f"{f}/{n}.png": encode(drawn(n)[1]) for f, listed in NAMES.items() for n in listed}
    write_archive(root / COCO_MASK_ARCHIVE.name, files | {"val2017/000000000139.png": content})
    message = refused(prepare, root)
    assert "val2017/000000000139.png" in message and reason in message


def test_missing_archives_are_named_before_anything_is_unpacked(tmp_path):
    root = write_archives(tmp_path / "cocostuff")
    for archive in (*cocostuff.COCO_IMAGE_ARCHIVES.values(), COCO_MASK_ARCHIVE):
        content = (root / archive.name).read_bytes()
        (root / archive.name).unlink()
        if archive is not cocostuff.COCO_IMAGE_ARCHIVES["train"]:
            message = refused(prepare, root)
            assert archive.name in message and archive.url in message and "--download" in message
            assert not (root / "images").exists() and not (root / "annotations").exists()
        (root / archive.name).write_bytes(content)
    assert "train2017.zip" in refused(prepare_cocostuff, tmp_path / "empty", progress=False)


def test_test_images_alone_can_be_prepared(root):
    (root / "train2017.zip").unlink()
    assert prepare(root) == {"train": 0, "val": 2}
    assert len(cocostuff_samples(root, "val")) == 2
    assert "train2017" in refused(cocostuff_samples, root, "train")


def test_miniature_is_not_taken_for_the_published_archive(root):
    message = refused(prepare_cocostuff, root, progress=False)
    assert "train2017.zip" in message and "cced6f7f71b7629ddf16f17bbcfab6b2" in message


@pytest.mark.parametrize("name", ["train2017.zip", "val2017.zip", COCO_MASK_ARCHIVE.name])
def test_truncated_archive_is_named(root, name):
    (root / name).write_bytes((root / name).read_bytes()[:-300])
    assert f"{name}: is damaged or incomplete" in refused(prepare, root)


def test_wrong_counts(root, complete, monkeypatch):
    monkeypatch.setattr(cocostuff, "COCO_COUNTS", {"train": 3, "val": 4})
    message = refused(prepare, root, partial=False)
    assert "val2017: images: found 2, expected 4" in message
    monkeypatch.setattr(cocostuff, "COCO_COUNTS", {"train": 2, "val": 2})
    for partial in (False, True):
        assert "train2017: images: found 3, expected 2" in refused(prepare, root, partial=partial)


def test_image_without_mask(root):
    files = {f"{f}/{n}.png": encode(drawn(n)[1]) for f, listed in NAMES.items() for n in listed}
    del files["train2017/000000000025.png"]
    write_archive(root / COCO_MASK_ARCHIVE.name, files)
    message = refused(prepare, root)
    assert f"train2017/000000000025{ID_SUFFIX}" in message and "1 of 3" in message and COCO_MASK_ARCHIVE.name in message
    message = refused(cocostuff_samples, root, "train")
    assert f"sptseg data cocostuff --root {root}" in message and f"000000000025{ID_SUFFIX}" in message


def test_archive_that_would_write_elsewhere(root):
    for evil in ("../train2017/000000000001.png", "train2017/../../000000000001.png"):
        write_archive(root / COCO_MASK_ARCHIVE.name, {"train2017/000000000009.png": b"x", evil: b"evil"})
        message = refused(prepare, root)
        assert COCO_MASK_ARCHIVE.name in message and "leads out of" in message
    assert not list(root.parent.rglob("000000000001*"))


def test_only_files_of_the_dataset_are_unpacked():
    assert place_cocostuff("train2017/000000000009.jpg") == "images/train2017/000000000009.jpg"
    assert place_cocostuff("val2017/000000000139.png") == "annotations/val2017/000000000139.png"
    for other in ("val2017/139.jpg", "test2017/000000000001.jpg", "__MACOSX/val2017/000000000139.jpg", "labels.txt"):
        assert place_cocostuff(other) is None


def test_folder_prepared_by_others_is_verified(root):
    prepare(root)
    for path in root.glob("*.zip"):
        path.unlink()
    path = root / f"annotations/train2017/000000000030{ID_SUFFIX}"
    good = path.read_bytes()
    Image.fromarray(np.full((24, 32), 171, np.uint8)).save(path)
    for check in (prepare, lambda root: cocostuff_samples(root, "train")[2]):
        message = refused(check, root)
        assert f"train2017/000000000030{ID_SUFFIX}: label 171" in message and "0..170" in message
    Image.fromarray(np.zeros((32, 24), np.uint8)).save(path)
    for check in (prepare, lambda root: cocostuff_samples(root, "train")[2]):
        assert "000000000030.jpg" in (message := refused(check, root)) and "24×32" in message and "32×24" in message
    path.write_bytes(good)
    image = root / "images/val2017/000000000139.jpg"
    image.write_bytes(image.read_bytes()[:-60])
    assert "000000000139.jpg" in refused(prepare, root)


def test_reading_what_is_not_there(tmp_path):
    message = refused(cocostuff_samples, tmp_path, "val")
    assert str(tmp_path / "images" / "val2017") in message and f"sptseg data cocostuff --root {tmp_path}" in message
    assert "train or val" in refused(cocostuff_samples, tmp_path, "test")
