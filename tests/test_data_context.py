"""PASCAL Context: the numbers of any family of masks become class ids by name, or a message says what is wrong."""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sptseg.core import IGNORE, UserError
from sptseg.data import context
from sptseg.data.context import (
    CONTEXT_MASK_ARCHIVE,
    CONTEXT_NAMES,
    IMAGE_FOLDER,
    LISTS,
    MASK_FOLDER,
    VOC2010_ARCHIVE,
    context_samples,
    named_lookup,
    place_image,
    place_mask,
    prepare_context,
    read_numbers,
)
from sptseg.data.label_sets import INVALID, load_label_set
from sptseg.data.miniatures import encode, write_archive, write_context_archives

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "pascal_context"
CLASSES = load_label_set("context-59").classes
SITE_LIST = "".join(f"{number}: {name}\n" for number, name in enumerate(CLASSES, 1)) + "\n"
SPLITS = {"train": ["2008_000002", "2008_000003"], "val": ["2009_000637", "2010_003321", "2010_000682"]}
ALL = [name for names in SPLITS.values() for name in names]


def drawn(name, size=(24, 32)):
    """An image, and a mask of blocks with numbers 0..59 and 255, both decided by the name."""
    rng = np.random.default_rng(int(name.replace("_", "")))
    blocks = rng.choice([*range(60), IGNORE], (size[0] // 2, size[1] // 2)).astype(np.uint8)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.kron(blocks, np.ones((2, 2), np.uint8))


def write_archives(root, splits=SPLITS, images=None, masks=None):
    """The published files, with drawn images unless others are given."""
    names = [name for listed in splits.values() for name in listed]
    images = images or {name: encode(drawn(name)[0], "jpeg") for name in names}
    masks = masks or {name: encode(drawn(name)[1]) for name in names}
    write_context_archives(root, splits, images, masks, SITE_LIST)
    return root


def prepare(root, **options):
    return prepare_context(root, **{"partial": True, "progress": False, **options})


def refused(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def root(tmp_path):
    return write_archives(tmp_path / "context")


@pytest.fixture
def complete(monkeypatch):
    """Let the drawn images be the complete dataset."""
    monkeypatch.setattr(context, "CONTEXT_COUNTS", {split: len(names) for split, names in SPLITS.items()})
    for name in ("VOC2010_ARCHIVE", "CONTEXT_MASK_ARCHIVE"):
        monkeypatch.setattr(context, name, replace(getattr(context, name), digest=None))


def test_list_in_the_documentation_is_the_published_file():
    """The MD5 of 59_labels.txt is known; the label sets have its names and its order."""
    assert hashlib.md5(SITE_LIST.encode(), usedforsecurity=False).hexdigest() == "993901f2d930cc038c406845f08fa082"


def test_prepared_labels_with_and_without_background(root):
    assert prepare(root) == {"train": 2, "val": 3}
    for split, names in SPLITS.items():
        with_background, without = (context_samples(root, split, background) for background in (True, False))
        assert [sample.name for sample in with_background] == names
        for sample, other in zip(with_background, without, strict=True):
            numbers = drawn(sample.name)[1]
            assert np.array_equal(sample.mask, numbers)
            assert np.array_equal(other.mask, np.where(np.isin(numbers, (0, IGNORE)), IGNORE, numbers - 1))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not there")
def test_real_samples(tmp_path):
    notes = (SAMPLES / "PROVENANCE.md").read_text()
    rows = re.findall(r"^\| (\d{4}_\d{6}) \|[^|]*\| (.*) \|$", notes, flags=re.MULTILINE)
    seen = {name: set(classes.split(", ")) for name, classes in rows}
    names = sorted(seen)
    images = {name: (SAMPLES / f"JPEGImages/{name}.jpg").read_bytes() for name in names}
    masks = {name: (SAMPLES / f"derived_index_59order/{name}.png").read_bytes() for name in names}
    root = write_archives(tmp_path, {"train": names[:1], "val": names[1:]}, images, masks)
    assert prepare(root) == {"train": 1, "val": 3}
    labels = load_label_set("context-60")
    for split in ("train", "val"):
        pairs = zip(context_samples(root, split, True), context_samples(root, split, False), strict=True)
        for with_background, without in pairs:
            name = with_background.name
            assert {labels.classes[i] for i in with_background.mask.unique().tolist()} == seen[name]
            found = {CLASSES[i] for i in without.mask.unique().tolist() if i != IGNORE}
            assert found == seen[name] - {"background"}
            derived = np.asarray(Image.open(SAMPLES / f"derived_index_59order/{name}.png"))
            assert np.array_equal(with_background.mask, derived)
            assert np.array_equal(without.mask == IGNORE, derived == 0)
    coloured = names[1]
    shutil.copyfile(SAMPLES / f"SegmentationClassContext/{coloured}.png", root / MASK_FOLDER / f"{coloured}.png")
    for check in (prepare, lambda root: context_samples(root, "val", True)[0]):
        message = refused(check, root)
        assert f"{MASK_FOLDER}/{coloured}.png" in message and "3 channels" in message


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("numbered", [True, False])
def test_any_order_of_numbers_gives_the_same_labels(root, seed, numbered):
    """Masks renumbered at will, with a list that says how, are read like the original ones."""
    prepare(root)
    expected = [sample.mask for sample in context_samples(root, "val", True)]
    order = (
        ["background", *np.random.default_rng(seed).permutation(CLASSES)] if seed else ["background", *sorted(CLASSES)]
    )
    table = np.full(256, IGNORE, np.uint8)
    table[:60] = [order.index(name) for name in ("background", *CLASSES)]
    for path in (root / MASK_FOLDER).glob("*.png"):
        Image.fromarray(table[np.asarray(Image.open(path))]).save(path)
    lines = [f"{number}: {name}" for number, name in enumerate(order)][::-1] if numbered else order
    (root / "labels.txt").write_text("\n".join(lines))
    assert prepare(root) == {"train": 2, "val": 3}
    for mask, sample in zip(expected, context_samples(root, "val", True), strict=True):
        assert np.array_equal(mask, sample.mask)


def test_spellings_and_forms_of_lists(tmp_path):
    path, labels = tmp_path / "labels.txt", load_label_set("context-59")
    path.write_text(SITE_LIST)
    table = named_lookup(path, labels)
    assert table[0] == IGNORE and table[IGNORE] == IGNORE and (table == INVALID).sum() == 195
    for old, new in [
        ("11: table", "11: diningtable"),
        ("11: table", "11 : Dining Table"),
        ("16: pottedplant", "16: potted plant"),
        ("20: tvmonitor", "20: TV/monitor"),
        ("52: bedclothes", "52: bedcloth"),
        ("28: cloth\n", "28: clothes\n"),
        ("1: aeroplane", "0: background\n1: aeroplane"),
        ("\n", "\r\n"),
        ("1: aeroplane", "\ufeff1: aeroplane"),
    ]:
        assert old in SITE_LIST
        path.write_text(SITE_LIST.replace(old, new), encoding="utf-8", newline="")
        assert np.array_equal(named_lookup(path, labels), table), (old, new)
    path.write_text("\n".join(CLASSES))  # names only, no background: counted from 1
    assert np.array_equal(named_lookup(path, labels), table)
    path.write_text("\n".join(f"{number}: {name}" for number, name in enumerate(CLASSES)))  # no background at all
    assert np.array_equal(named_lookup(path, labels)[:59], np.arange(59)) and read_numbers(path)[0] == "aeroplane"


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("20: tvmonitor", "20: television", "'television' is no class"),
        ("20: tvmonitor", "20: table", "'table' is listed twice"),
        ("20: tvmonitor", "20: diningtable", "'table' is listed twice"),
        ("20: tvmonitor", "19: tvmonitor", "number 19 is listed twice"),
        ("20: tvmonitor\n", "", "'tvmonitor' is not listed"),
        ("20: tvmonitor", "255: tvmonitor", "number 255 is outside 0..254"),
        ("20: tvmonitor", "tvmonitor", "line 'tvmonitor' has no number"),
        (SITE_LIST, "\n\n", "holds no names"),
        (SITE_LIST, "1: accordion\n2: aeroplane\n3: air conditioner", "'accordion' and 1 more is no class"),
    ],
)
def test_list_that_cannot_be_meant(root, old, new, reason):
    prepare(root)
    (root / "labels.txt").write_text(SITE_LIST.replace(old, new))
    for check in (prepare, lambda root: context_samples(root, "val", False)):
        message = refused(check, root)
        assert str(root / "labels.txt") in message and reason in message


def test_run_again_makes_what_is_missing(root, complete):
    assert prepare(root, partial=False) == {"train": 2, "val": 3}
    lost = [root / IMAGE_FOLDER / f"{ALL[0]}.jpg", root / MASK_FOLDER / f"{ALL[3]}.png", root / LISTS / "val.txt"]
    contents = [path.read_bytes() for path in lost]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*") if path.is_file() and path not in lost}
    for path in lost:
        path.unlink()
    assert prepare(root, partial=False) == {"train": 2, "val": 3}
    assert contents == [path.read_bytes() for path in lost]
    kept = [path for path in before if not path.name.startswith(".")]
    assert all(before[path] == path.stat().st_mtime_ns for path in kept)
    for name in (VOC2010_ARCHIVE.name, CONTEXT_MASK_ARCHIVE.name, CONTEXT_NAMES.name):
        (root / name).unlink()
    assert prepare(root, partial=False) == {"train": 2, "val": 3}, "archives are not needed any more"


def test_masks_of_unknown_origin_need_their_list(root):
    """Masks are there, labels.txt is not: the site's list must not be taken for theirs."""
    prepare(root)
    (root / "labels.txt").unlink()
    message = refused(prepare, root)
    assert str(root / "labels.txt") in message and "does not exist" in message
    assert not (root / "labels.txt").exists()
    assert "labels.txt" in refused(context_samples, root, "val", True)


def test_site_masks_are_not_mixed_with_another_list(root):
    prepare(root)
    (root / "labels.txt").write_text("\n".join(["background", *sorted(CLASSES)]))
    (root / MASK_FOLDER / f"{ALL[0]}.png").unlink()
    message = refused(prepare, root)
    assert str(root / "labels.txt") in message and CONTEXT_MASK_ARCHIVE.name in message
    assert not (root / MASK_FOLDER / f"{ALL[0]}.png").exists()


def test_missing_archives_are_named(tmp_path):
    root = tmp_path / "context"
    for archive in (CONTEXT_MASK_ARCHIVE, CONTEXT_NAMES, VOC2010_ARCHIVE):
        write_archives(root)
        (root / archive.name).unlink()
        message = refused(prepare, root)
        assert archive.name in message and archive.url in message and "--download" in message
        assert not (root / IMAGE_FOLDER).exists() and not (root / MASK_FOLDER).exists()


def test_miniature_is_not_taken_for_the_published_archive(root):
    message = refused(prepare_context, root, progress=False)
    assert CONTEXT_MASK_ARCHIVE.name in message and CONTEXT_MASK_ARCHIVE.digest.removeprefix("md5:") in message


@pytest.mark.parametrize("name", [VOC2010_ARCHIVE.name, CONTEXT_MASK_ARCHIVE.name])
def test_truncated_archive_is_named(root, name):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])
    message = refused(prepare, root)
    assert str(root / name) in message


def test_wrong_counts(root, complete, monkeypatch):
    monkeypatch.setattr(context, "CONTEXT_COUNTS", {"train": 2, "val": 4})
    message = refused(prepare, root, partial=False)
    assert f"{LISTS}/val.txt: names: found 3, expected 4" in message
    assert prepare(root) == {"train": 2, "val": 3}
    monkeypatch.setattr(context, "CONTEXT_COUNTS", {"train": 1, "val": 3})
    assert "found 2, expected 1" in refused(prepare, root)


@pytest.mark.parametrize(
    "content, reason",
    [
        (encode(np.full((24, 32), 60, np.uint8)), "label 60"),
        (encode(np.zeros((24, 32, 3), np.uint8)), "3 channels"),
        (encode(np.full((24, 32), 300, np.uint16)), "label 300"),
        (encode(np.zeros((32, 24), np.uint8)), "24×32"),
        (encode(drawn(ALL[3])[1])[:-40], "incomplete"),
    ],
)
def test_mask_that_cannot_be_used_is_named(root, content, reason):
    masks = {name: encode(drawn(name)[1]) for name in ALL} | {ALL[3]: content}
    write_archives(root, masks=masks)
    message = refused(prepare, root)
    assert f"{MASK_FOLDER}/{ALL[3]}.png" in message and reason in message
    message = refused(lambda: context_samples(root, "val", False)[1])
    assert f"{ALL[3]}.png" in message and reason in message


def test_image_without_mask_and_broken_image(root):
    masks = {name: encode(drawn(name)[1]) for name in ALL if name != ALL[4]}
    write_archives(root, masks=masks)
    message = refused(prepare, root)
    assert f"{MASK_FOLDER}/{ALL[4]}.png" in message and CONTEXT_MASK_ARCHIVE.name in message
    message = refused(context_samples, root, "val", True)
    assert f"{ALL[4]}.png" in message and f"sptseg data context --root {root}" in message
    images = {name: encode(drawn(name)[0], "jpeg") for name in ALL}
    root = write_archives(root.parent / "other", images=images | {ALL[1]: images[ALL[1]][:-50]})
    assert f"{ALL[1]}.jpg" in refused(prepare, root)


def test_only_files_of_the_dataset_are_unpacked():
    assert place_image("VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg") == "JPEGImages/2008_000002.jpg"
    assert place_image("VOCdevkit/VOC2010/ImageSets/Main/val.txt") == f"{LISTS}/val.txt"
    assert place_mask("59_context_labels/2008_000002.png") == f"{MASK_FOLDER}/2008_000002.png"
    for other in ("ImageSets/Main/cat_val.txt", "SegmentationClass/2008_000002.png", "../JPEGImages/2008_000002.jpg"):
        assert place_image(f"VOCdevkit/VOC2010/{other}") is None
    assert place_mask("59_context_labels/._2008_000002.png") is None


def test_archive_that_would_write_elsewhere(root):
    write_archive(root / CONTEXT_MASK_ARCHIVE.name, {"../2008_000002.png": b"evil"})
    assert "leads out of" in refused(prepare, root)
    assert not list(root.parent.glob("*.png"))


def test_reading_what_is_not_there(tmp_path):
    message = refused(context_samples, tmp_path, "val", True)
    assert f"{LISTS}/val.txt" in message and f"sptseg data context --root {tmp_path}" in message
    assert "train or val" in refused(context_samples, tmp_path, "test", True)
