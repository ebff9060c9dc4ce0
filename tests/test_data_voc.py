"""PASCAL VOC 2012: both official layouts in miniature, real samples, and whatever can be missing or wrong."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from sptseg.core import UserError
from sptseg.data import voc
from sptseg.data.miniatures import encode, write_voc_archives
from sptseg.data.voc import (
    SBD_ARCHIVE,
    VOC_ARCHIVE,
    convert_sbd_mask,
    prepare_voc,
    read_sbd_mask,
    voc_palette,
    voc_samples,
)

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "../shared/samples/voc2012"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="real samples of VOC are not here")
prepare = partial(prepare_voc, partial=True, progress=False)


def message(function, *arguments, **keywords):
    """The line that a user reads."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jpg_bytes(shape, rng):
    """A noisy image."""
    Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def make_miniature(root, count=6):
    """`count` images for each of train, val and aug; returns all masks as arrays."""
    rng = np.random.default_rng(0)
    lists = {key: [f"200{year}_{n:06d}" for n in range(count)] for key, year in [("train", 7), ("val", 8), ("aug", 9)]}
    names = [name for key in ("train", "val", "aug") for name in lists[key]]
    shapes = {name: (20 + index % 5, 30 + index % 3) for index, name in enumerate(names)}
    masks = {name: rng.integers(0, 21, shapes[name]).astype(np.uint8) for name in names}
    own = {name: np.where(rng.random(shapes[name]) < 0.1, 255, masks[name]).astype(np.uint8) for name in names}
    images = {name: jpg_bytes(shapes[name], rng) for name in names}
    voc_masks = {name: encode(own[name], "png", voc_palette()) for key in ("train", "val") for name in lists[key]}
    sbd = {"sbd_train": lists["aug"][::-2] + lists["train"][:2] + lists["val"][:1], "sbd_val": lists["aug"][-2::-2]}
    sbd["sbd_val"] += lists["val"][1:2]
    in_sbd = {name: encode(masks[name], "mat") for name in sbd["sbd_train"] + sbd["sbd_val"]}
    write_voc_archives(root, {**lists, **sbd}, images, voc_masks, in_sbd)
    return lists, {name: masks[name] if name in lists["aug"] else own[name] for name in names}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Archives, lists and masks; not to be changed."""
    root = tmp_path_factory.mktemp("voc")
    return root, *make_miniature(root)


@pytest.fixture
def root(miniature, tmp_path):
    """A folder with both archives."""
    shutil.copytree(miniature[0], tmp_path / "voc")
    return tmp_path / "voc"


def as_labels(numbers):
    """The protocol: 0 → 255, k → k − 1, 255 stays."""
    shifted = numbers.astype(int) - 1
    return torch.from_numpy(np.where((numbers == 0) | (numbers == 255), 255, shifted))


@pytest.mark.parametrize("workers", [0, 2])
def test_archives_become_the_protocols_samples(miniature, root, workers):
    _, lists, masks = miniature
    assert prepare(root, workers=workers) == {"train": 6, "aug": 6, "trainaug": 12, "val": 6}
    expected = {"train": lists["train"] + sorted(lists["aug"]), "val": lists["val"]}
    for split, names in expected.items():
        samples = voc_samples(root, split)
        assert [sample.name for sample in samples] == names
        for sample in samples:
            assert torch.equal(sample.mask.int(), as_labels(masks[sample.name]).int())
            assert sample.image.shape[1:] == sample.mask.shape
    folder = root / "VOC2012/ImageSets/Segmentation"
    assert (folder / "aug.txt").read_text().split() == sorted(lists["aug"])
    assert (folder / "trainaug.txt").read_text().split() == expected["train"]
    assert not list(root.rglob("SegmentationObject")) and not list(root.rglob("img"))


def test_preparing_twice_changes_nothing_and_needs_no_archives(root):
    counts = prepare(root)
    times = {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    assert prepare(root) == counts
    assert times == {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    for name in (VOC_ARCHIVE.name, SBD_ARCHIVE.name):
        (root / name).unlink()
    shutil.rmtree(root / "benchmark_RELEASE")
    assert prepare(root) == counts


@pytest.mark.parametrize("place", ["VOC2012", "VOCdevkit/VOC2012", "."])
def test_a_folder_made_for_mmsegmentation_serves_as_it_is(miniature, root, tmp_path, place):
    _, lists, masks = miniature
    prepare(root)
    base = tmp_path / "other" / place
    shutil.copytree(root / "VOC2012", base)
    names = base / "ImageSets/Segmentation"
    names.joinpath("aug.txt").write_text("\n".join(random.Random(1).sample(lists["aug"], 6)))
    for name in lists["train"]:  # mmsegmentation converts these too; they must not be used
        (base / "SegmentationClassAug" / f"{name}.png").write_bytes(
            encode(np.full((3, 3), 7, np.uint8), "png", voc_palette())
        )
    assert prepare(tmp_path / "other")["trainaug"] == 12
    samples = voc_samples(tmp_path / "other", "train")
    assert [sample.name for sample in samples] == lists["train"] + sorted(lists["aug"])
    assert all(torch.equal(sample.mask.int(), as_labels(masks[sample.name]).int()) for sample in samples)


def test_missing_archives_and_files_are_named(root):
    (root / SBD_ARCHIVE.name).rename(root.parent / SBD_ARCHIVE.name)
    said = message(prepare, root)
    assert SBD_ARCHIVE.name in said and SBD_ARCHIVE.url in said and "--download" in said
    (root / "archives").mkdir()
    (root.parent / SBD_ARCHIVE.name).rename(root / "archives" / SBD_ARCHIVE.name)
    prepare(root)
    (root / VOC_ARCHIVE.name).unlink()
    for file in ("JPEGImages/2007_000002.jpg", "SegmentationClass/2008_000003.png", "JPEGImages/2009_000001.jpg"):
        kept = (root / "VOC2012" / file).read_bytes()
        (root / "VOC2012" / file).unlink()
        said = message(prepare, root)
        assert file in said and VOC_ARCHIVE.name in said
        assert file in message(voc_samples, root, "val" if "2008" in file else "train")
        (root / "VOC2012" / file).write_bytes(kept)
    (root / "VOC2012/SegmentationClassAug/2009_000001.png").unlink()
    assert prepare(root)["aug"] == 6, "made again from the .mat file"


def test_published_archives_are_checked_by_their_checksums(root):
    for name, digest in [(VOC_ARCHIVE.name, VOC_ARCHIVE.digest), (SBD_ARCHIVE.name, SBD_ARCHIVE.digest)]:
        assert digest.startswith("md5:") and len(digest) == 36
        said = message(prepare_voc, root, progress=False)
        assert str(root / name) in said and digest[4:] in said
        prepare(root)
        (root / name).unlink()
        for split in ("aug", "trainaug"):
            (root / f"VOC2012/ImageSets/Segmentation/{split}.txt").unlink()
        shutil.rmtree(root / "benchmark_RELEASE")


def test_counts_are_those_of_the_protocol(root, monkeypatch):
    prepare(root)
    said = message(prepare_voc, root, progress=False)
    assert "train.txt: found 6, expected 1,464" in said
    for right in (dict(train=6, val=6, aug=7), dict(train=6, val=5, aug=6)):
        monkeypatch.setattr(voc, "VOC_COUNTS", {**right, "trainaug": 12})
        split = "aug" if right["aug"] == 7 else "val"
        assert f"{split}.txt: found 6, expected {right[split]}" in message(prepare_voc, root, progress=False)
    monkeypatch.setattr(voc, "VOC_COUNTS", dict(train=6, val=6, aug=6, trainaug=12))
    assert prepare_voc(root, progress=False)["trainaug"] == 12


def passed_around(root, folder):
    """A prepared dataset as it is passed around: all masks and trainaug.txt, but neither aug.txt nor archives."""
    shutil.copytree(root / "VOC2012", folder / "VOCdevkit/VOC2012", ignore=shutil.ignore_patterns("aug.txt", ".*"))
    base = folder / "VOCdevkit/VOC2012"
    for mask in (base / "SegmentationClass").glob("2007*"):  # masks of training images, which are not used
        (base / "SegmentationClassAug" / mask.name).write_bytes(encode(np.full((3, 3), 7, np.uint8)))
    union = base / "ImageSets/Segmentation/trainaug.txt"
    union.write_text("\n".join(random.Random(2).sample(union.read_text().split(), 12)))
    return base, union


@pytest.mark.parametrize("prepared", [False, True])
def test_a_folder_without_sbd_is_accepted(miniature, root, tmp_path, prepared):
    _, lists, masks = miniature
    prepare(root)
    folder = tmp_path / "given"
    base, union = passed_around(root, folder)
    before = sorted(folder.rglob("*"))
    if prepared:
        assert prepare(folder) == {"train": 6, "aug": 6, "trainaug": 12, "val": 6}
    assert sorted(folder.rglob("*")) == before, "nothing is added"
    samples = voc_samples(folder, "train")
    assert [sample.name for sample in samples] == lists["train"] + sorted(lists["aug"])
    assert all(torch.equal(sample.mask.int(), as_labels(masks[sample.name]).int()) for sample in samples)
    base.joinpath("ImageSets/Segmentation/aug.txt").write_text("\n".join(lists["aug"][1:]))
    assert len(voc_samples(folder, "train")) == 11, "aug.txt counts where it exists"


def test_a_folder_without_sbd_is_checked(miniature, root, tmp_path, monkeypatch):
    _, lists, _ = miniature
    prepare(root)
    folder = tmp_path / "given"
    base, union = passed_around(root, folder)
    names = union.read_text()
    for wrong, words in [
        (f"{names}\n2008_000003", "2008_000003 is in both aug and val"),
        (names.replace("2007_000004", ""), "lacks 2007_000004 of train.txt (1 such names)"),
        ("\n".join(lists["train"]), "adds no name to train.txt"),
        (f"{names}\n2009_000099", "2009_000099"),
    ]:
        union.write_text(wrong)
        for said in (message(prepare, folder), message(voc_samples, folder, "train")):
            assert str(base) in said and words in said
    union.write_text(names)
    monkeypatch.setattr(voc, "VOC_COUNTS", dict(train=6, val=6, aug=7, trainaug=13))
    said = message(prepare_voc, folder, progress=False)
    assert f"{union}: names besides those of train.txt: found 6, expected 7" in said
    mask = base / "SegmentationClassAug/2009_000000.png"
    Image.fromarray(voc_palette()[np.asarray(Image.open(mask))]).save(mask)
    for said in (message(prepare, folder), message(voc_samples, folder, "train")):
        assert str(mask) in said and "3 channels" in said
    mask.unlink()
    for said in (message(prepare, folder), message(voc_samples, folder, "train")):
        assert said.startswith(f"{mask} does not exist (1 of ")
    assert SBD_ARCHIVE.url in message(prepare, folder)


def test_a_list_that_leaks_test_images_is_refused(root):
    prepare(root)
    file = root / "VOC2012/ImageSets/Segmentation/aug.txt"
    names = file.read_text()
    for leaked in ("2008_000002", "2007_000002"):
        file.write_text(f"{names}{leaked}\n")
        assert str(file) in (said := message(prepare, root)) and leaked in said
    file.unlink()
    assert prepare(root)["aug"] == 6 and not file.exists(), "trainaug.txt is enough"
    (root / "VOC2012/ImageSets/Segmentation/trainaug.txt").unlink()
    assert prepare(root)["aug"] == 6 and file.read_text() == names


def test_wrong_samples_are_named(root):
    prepare(root)
    base = root / "VOC2012"
    masks = {file: (base / file).read_bytes() for file in ("SegmentationClass/2007_000001.png",)}
    mask = np.asarray(Image.open(base / "SegmentationClass/2007_000001.png"))
    for wrong, words in [
        (np.maximum(mask, 21), "label"),
        (mask[:-1], "30×19" if mask.shape == (20, 30) else "×"),
        (voc_palette()[mask], "3 channels"),
        (np.full(mask.shape, 300, np.uint16), "label 300"),
    ]:
        Image.fromarray(wrong).save(base / "SegmentationClass/2007_000001.png")
        assert "2007_000001.png" in (said := message(prepare, root)) and words in said
    (base / "SegmentationClass/2007_000001.png").write_bytes(masks["SegmentationClass/2007_000001.png"])
    cut = base / "JPEGImages/2009_000003.jpg"
    content = cut.read_bytes()
    cut.write_bytes(content[:-40])
    assert str(cut) in message(prepare, root)
    cut.unlink()
    assert prepare(root)["train"] == 6 and cut.read_bytes() == content, "deleted and unpacked again"


def test_broken_mat_files_are_named(miniature, root):
    prepare(root)
    shutil.rmtree(root / "VOC2012/SegmentationClassAug")
    mat = root / "benchmark_RELEASE/dataset/cls/2009_000004.mat"
    content, mask = mat.read_bytes(), read_sbd_mask(mat)
    assert np.array_equal(mask, miniature[2]["2009_000004"])
    savemat(other := io.BytesIO(), {"GTinst": 3})
    for wrong in (b"", b"<html>", content[:100], content[:-50], other.getvalue(), encode(mask.astype(float), "mat")):
        mat.write_bytes(wrong)
        assert str(mat) in message(prepare, root)
    mat.unlink()
    assert prepare(root)["aug"] == 6 and mat.read_bytes() == content


def test_converted_masks_can_be_looked_at(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    (tmp_path / "a.mat").write_bytes(encode(mask, "mat"))
    convert_sbd_mask(tmp_path / "a.mat", tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), mask)
    assert np.array_equal(np.asarray(image.convert("RGB")), voc_palette()[mask])


def test_the_palette_is_a_permutation_of_bits():
    palette = voc_palette().astype(int)
    for number in range(256):
        red, green, blue = palette[number]
        back = sum(
            (channel >> (7 - place) & 1) << (3 * place + shift)
            for shift, channel in enumerate((red, green, blue))
            for place in range(3)
        )
        assert back & 255 == number


def test_what_is_not_prepared_says_how_to(tmp_path, root):
    for split in ("train", "val"):
        said = message(voc_samples, tmp_path / "none", split)
        assert f"sptseg data voc --root {tmp_path / 'none'}" in said and "train.txt" in said or split == "val"
    assert "'test'" in message(voc_samples, root, "test")


PREPARE_AGAIN_AND_AGAIN = """
import os, sys
from sptseg.data.voc import prepare_voc

for line in sys.stdin:
    if not (child := os.fork()):
        prepare_voc(sys.argv[1], partial=True, progress=False)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that the libraries are imported once")
def test_kills_at_any_time_do_no_harm(tmp_path):
    root = tmp_path / "voc"
    lists, masks = make_miniature(root, count=80)
    command = [sys.executable, "-c", PREPARE_AGAIN_AND_AGAIN, root]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rng, statuses = random.Random(0), []
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    with subprocess.Popen(command, env=environment, **pipes) as server:
        for _ in range(12):
            server.stdin.write("\n")
            child, before = int(server.stdout.readline()), len(list(root.rglob("*")))
            limit, end = before + rng.randrange(1, 80), time.monotonic() + 2
            while time.monotonic() < end and len(list(root.rglob("*"))) < limit:
                time.sleep(0.001)
            with suppress(ProcessLookupError):  # it has finished
                os.kill(child, signal.SIGKILL)
            statuses.append(int(server.stdout.readline()))
        server.stdin.close()
    assert statuses.count(signal.SIGKILL) >= 5, "killed in the middle"
    assert prepare(root) == {"train": 80, "aug": 80, "trainaug": 160, "val": 80}
    for split in ("train", "val"):
        for sample in voc_samples(root, split):
            assert torch.equal(sample.mask.int(), as_labels(masks[sample.name]).int())


@needs_samples
def test_real_images_and_masks(tmp_path):
    own = {file.stem: file.read_bytes() for file in sorted((SAMPLES / "SegmentationClass").glob("*.png"))}
    aug = {file.stem: np.asarray(Image.open(file)) for file in (SAMPLES / "SegmentationClassAug").glob("*.png")}
    images = {file.stem: file.read_bytes() for file in (SAMPLES / "JPEGImages").glob("*.jpg")}
    assert set(own) | set(aug) == set(images) and len(own) > 10 and len(aug) >= 3
    names = sorted(own)
    lists = {"train": names[::2], "val": names[1::2], "sbd_train": [*aug, names[0], names[1]], "sbd_val": [names[3]]}
    sbd = {name: encode(mask, "mat") for name, mask in aug.items()}
    sbd |= {
        name: encode(np.asarray(Image.open(io.BytesIO(own[name]))), "mat") for name in (names[0], names[1], names[3])
    }
    write_voc_archives(tmp_path, lists, images, own, sbd)
    counts = prepare(tmp_path)
    assert counts == dict(
        train=len(names[::2]), aug=len(aug), trainaug=len(names[::2]) + len(aug), val=len(names[1::2])
    )
    for split, expected in [("train", names[::2] + sorted(aug)), ("val", names[1::2])]:
        samples = voc_samples(tmp_path, split)
        assert [sample.name for sample in samples] == expected
        for sample in samples:
            numbers = aug.get(sample.name)
            if numbers is None:
                numbers = np.asarray(Image.open(io.BytesIO(own[sample.name])))
                assert 255 in numbers, "VOC's masks have borders"
            assert torch.equal(sample.mask.int(), as_labels(numbers).int())
            decoded = np.asarray(Image.open(io.BytesIO(images[sample.name])).convert("RGB"))
            assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), decoded)
    for file in (SAMPLES / "SegmentationClassAug").glob("*.png"):
        made, published = (
            Image.open(folder / file.name)
            for folder in (tmp_path / "VOC2012/SegmentationClassAug", SAMPLES / "SegmentationClassAug")
        )
        assert np.array_equal(np.asarray(made), np.asarray(published))
        used = np.unique(np.asarray(made))
        palettes = [np.array(image.getpalette()).reshape(-1, 3)[used] for image in (made, published)]
        assert np.array_equal(*palettes), "the computed palette is the published one"
