"""Reading images, masks and lists: exactly what the files hold, or an error that names the file."""

import io
import pickle
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import DataLoader

from sptseg.core import IGNORE, UserError
from sptseg.data.files import (
    END,
    FileSamples,
    check_present,
    decode,
    decode_jpeg,
    image_size,
    read_bytes,
    read_image,
    read_mask,
    read_names,
)
from sptseg.data.label_sets import LabelSet, load_label_set, raw_lookup
from sptseg.inference.images import as_image

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="sample images and masks are not here")
PALETTE = list(np.random.default_rng(1).integers(0, 256, 768))
COCO_GAPS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}  # data set's ids without a class in the 171


def noise(height=20, width=30, channels=3, high=256, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def pair(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    Image.fromarray(noise(channels=1, high=4)).save(tmp_path / "a_mask.png")
    return tmp_path / "a.png", tmp_path / "a_mask.png"


def voc_colours():
    "VOC's colour map: bits 0, 1, 2 of the number are the highest bits of R, G, B, bits 3, 4, 5 the next ones."
    numbers = np.arange(256)
    colours = [sum(((numbers >> (3 * level + c)) & 1) << (7 - level) for level in range(3)) for c in range(3)]
    return np.stack(colours, 1)


# Images


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    array = noise()
    image = Image.fromarray(array).convert(mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    read = read_image(file)
    assert read.shape == (3, 20, 30) and read.dtype == torch.uint8
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(read.permute(1, 2, 0), array)
    if mode in ("L", "LA"):
        assert torch.equal(read[0], read[1]) and np.array_equal(read[2], np.asarray(image.convert("L")))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "jpeg", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(200, 131), (1, 1), (8, 17)])
def test_opencv_decodes_to_the_same_bytes_as_pillow(mode, size):
    smooth = Image.fromarray(noise(12, 16)).resize(size, Image.Resampling.BICUBIC).convert(mode)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"quality": 100}):
        content = jpeg(smooth, **options)
        expected = np.asarray(decode(content, "x").convert("RGB"))
        assert np.array_equal(decode_jpeg(content, "x").permute(1, 2, 0), expected)


def test_jpegs_that_opencv_would_change_or_fill_with_grey_are_left_to_pillow():
    image = Image.fromarray(noise())
    content, rotated = jpeg(image), Image.Exif()
    rotated[0x0112] = 6
    assert decode_jpeg(content, "x") is not None
    others = [jpeg(image.convert("CMYK")), jpeg(image, exif=rotated), content + b"\0", b"", b"GIF89a"]
    others += [content[:size] for size in range(len(content))]
    others += [content[:size] + END + content[size:] for size in range(700, len(content) - 2, 9)]
    assert not any(decode_jpeg(other, "x") is not None for other in others)


def test_damaged_jpegs_are_read_by_opencv_only_where_pillow_reads_the_same():
    content, refused = jpeg(Image.fromarray(noise(64, 64)), restart_marker_blocks=5), 0
    for index in range(2, len(content), 3):
        damaged = content[:index] + bytes([content[index] ^ 16]) + content[index + 1 :]
        try:
            expected = np.asarray(decode(damaged, "x").convert("RGB"))
        except UserError:
            refused += 1
            assert decode_jpeg(damaged, "x") is None
            continue
        read = decode_jpeg(damaged, "x")
        assert read is None or np.array_equal(read.permute(1, 2, 0), expected)
    assert refused > 5


def test_transparent_palettes_are_read_without_a_warning(tmp_path, recwarn):
    image = Image.fromarray(noise(channels=1)).convert("P")
    image.putpalette(PALETTE)
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    colours = np.array(PALETTE).reshape(256, 3)[noise(channels=1)]
    assert np.array_equal(read_image(tmp_path / "x.png").permute(1, 2, 0), colours) and not recwarn


@pytest.mark.parametrize("note", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_every_orientation_is_applied_as_pillow_would(tmp_path, note, ending):
    exif = Image.Exif()
    exif[0x0112] = note
    file = tmp_path / f"x.{ending}"
    Image.fromarray(noise()).save(file, exif=exif)
    read = read_image(file)
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        assert image_size(file) == (read.shape[2], read.shape[1])
    assert np.array_equal(read.permute(1, 2, 0), expected) and read.shape[1:] == ((20, 30) if note < 5 else (30, 20))
    assert torch.equal(read, as_image(file)), "the note is obeyed once, whatever the way in"


def test_unreadable_and_senseless_notes_turn_nothing(tmp_path):
    for number, data in enumerate([b"Exif\0\0broken", b"Exif\0\0MM\0\x2a\0\0\0\xff"]):
        Image.fromarray(noise()).save(tmp_path / f"{number}.jpg", exif=data, quality=100)
        Image.fromarray(noise()).save(tmp_path / "plain.jpg", quality=100)
        assert torch.equal(read_image(tmp_path / f"{number}.jpg"), read_image(tmp_path / "plain.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(noise()).save(tmp_path / "77.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "77.png").permute(1, 2, 0), noise())


def test_rotated_images_and_masks_fit_and_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(noise(30, 20, 1, 4)).save(tmp_path / "drawn.png")
    Image.fromarray(noise(20, 30, 1, 4)).save(tmp_path / "unrotated.png")
    data = FileSamples(images=[tmp_path / "a.png"] * 2, masks=[tmp_path / "drawn.png", tmp_path / "unrotated.png"])
    assert data.is_rotated(0) and np.array_equal(data[0].mask, noise(30, 20, 1, 4))
    assert "rotated by its EXIF orientation" in refusal(data.__getitem__, 1)


# Large and elongated images


def test_the_limit_of_the_size_is_ours_and_can_be_set(tmp_path, monkeypatch, recwarn):
    file = tmp_path / "x.png"
    Image.fromarray(noise()).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse above 200
    assert read_image(file).shape == (3, 20, 30) and not recwarn and Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setenv("SPTSEG_MAX_PIXELS", "599")
    for reader in (read_image, read_mask, as_image):
        text = refusal(reader, file)
        assert text.startswith(f"{file}: is 30×20, 600 pixels; the limit is 599") and "SPTSEG_MAX_PIXELS=600" in text
    monkeypatch.setenv("SPTSEG_MAX_PIXELS", "600")
    assert read_image(file).shape == (3, 20, 30)


@pytest.mark.parametrize("value", ["many", "-3", "0", "1e9", "2.5"])
def test_a_limit_that_is_no_number_is_named(tmp_path, monkeypatch, value):
    Image.fromarray(noise()).save(tmp_path / "x.png")
    monkeypatch.setenv("SPTSEG_MAX_PIXELS", value)
    assert refusal(read_image, tmp_path / "x.png").startswith(f"SPTSEG_MAX_PIXELS: {value!r} is not")


def test_a_large_sound_image_is_read(tmp_path, recwarn):
    Image.new("1", (14_000, 13_000)).save(tmp_path / "big.png")  # above both of Pillow's limits
    assert decode(read_bytes(tmp_path / "big.png"), "big.png").size == (14_000, 13_000) and not recwarn


@pytest.mark.parametrize(("size", "read"), [((1, 100), True), ((100, 1), True), ((1, 101), False), ((909, 9), False)])
def test_elongated_images_are_read_up_to_a_hundred_to_one(tmp_path, size, read):
    Image.new("RGB", size).save(tmp_path / "strip.png")
    for reader in (read_image, as_image):
        if read:
            assert reader(tmp_path / "strip.png").shape == (3, *size[::-1])
        else:
            assert refusal(reader, tmp_path / "strip.png").startswith(f"{tmp_path / 'strip.png'}: is {size[0]}×")


@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_what_is_no_image_is_named(tmp_path, reader):
    page, empty = tmp_path / "page.png", tmp_path / "empty.png"
    page.write_text("<html>not found</html>")
    empty.touch()
    for path, reason in [(page, "is not an image"), (empty, "is empty"), (tmp_path / "no.png", "No such file")]:
        text = refusal(reader, path)
        assert text.startswith(f"{path}: ") and reason in text and "0x" not in text
    assert refusal(reader, tmp_path).startswith(f"{tmp_path}: cannot be read")


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(("ending", "reader"), [("jpg", read_image), ("png", read_image), ("png", read_mask)])
def test_truncated_files_are_refused_even_if_pillow_was_told_to_bear_them(
    tmp_path, monkeypatch, ending, reader, tolerant
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    file = tmp_path / f"x.{ending}"
    Image.fromarray(noise(200, 200, channels=1 if reader is read_mask else 3, high=9)).save(file)
    content, whole = file.read_bytes(), reader(file)
    for share in (0.1, 0.5, 0.9, 0.99):
        file.write_bytes(content[: int(len(content) * share)])
        assert refusal(reader, file).startswith(f"{file}: is ")
    file.write_bytes(content)
    assert torch.equal(reader(file), whole) and ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_a_flipped_bit_of_a_mask_is_noticed(pair):
    content, whole = pair[1].read_bytes(), read_mask(pair[1])
    unnoticed = []
    for index in range(len(content)):
        pair[1].write_bytes(content[:index] + bytes([content[index] ^ 16]) + content[index + 1 :])
        try:
            unnoticed.append(torch.equal(read_mask(pair[1]), whole))
        except UserError:
            continue
    assert all(unnoticed) and len(unnoticed) < len(content) / 10


def test_images_of_16_bits_are_refused(tmp_path):
    Image.fromarray(noise(channels=1).astype(np.uint16) * 200).save(tmp_path / "x.png")
    assert "16 bits or more" in refusal(read_image, tmp_path / "x.png")


# Masks


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_keep_their_indices(tmp_path, bits):
    numbers = noise(channels=1, high=2**bits)
    mask = Image.fromarray(numbers).convert("P")
    mask.putpalette(PALETTE)
    mask.save(tmp_path / "x.png", bits=bits)
    assert (tmp_path / "x.png").read_bytes()[24] == bits
    assert np.array_equal(read_mask(tmp_path / "x.png"), numbers)


def test_grey_masks_keep_their_numbers(tmp_path):
    numbers = noise(channels=1)
    Image.fromarray(numbers).save(tmp_path / "x.png")
    read = read_mask(tmp_path / "x.png")
    assert read.dtype == torch.uint8 and np.array_equal(read, numbers)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("RGB", "(3 channels)"),
        ("RGBA", "(4 channels)"),
        ("LA", "(2 channels)"),
        ("1", "1-bit grey"),
    ],
)
def test_masks_with_colours_or_other_depths_are_refused(tmp_path, mode, reason):
    numbers = noise(channels=1, high=4)
    Image.fromarray(numbers).convert(mode).save(tmp_path / "x.png")
    text = refusal(read_mask, tmp_path / "x.png")
    assert text.startswith(f"{tmp_path / 'x.png'}: ") and reason in text and "8-bit" in text


def test_grey_masks_of_few_bits_would_be_stretched_and_are_refused(tmp_path):
    numbers = noise(channels=1, high=4)
    rows = b"".join(
        b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in numbers
    )  # newer versions of Pillow write 8 bits
    parts = [(b"IHDR", struct.pack(">2I5B", 30, 20, 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), numbers), "Pillow multiplies by 17"
    assert "4-bit grey" in refusal(read_mask, tmp_path / "x.png")


def test_masks_in_other_formats_are_refused(tmp_path):
    Image.fromarray(noise(channels=1, high=4)).save(tmp_path / "x.jpg")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.jpg").read_bytes())  # the ending does not decide
    for file in ("x.jpg", "x.png"):
        assert "is not a PNG file" in refusal(read_mask, tmp_path / file)


# Lists


def test_lists_are_read_in_order_whatever_the_line_ends(tmp_path):
    file = tmp_path / "train.txt"
    for content in (b"b\na\n", b"b\r\n\r\na", "\ufeffb\n  a  \n\n".encode()):
        file.write_bytes(content)
        assert read_names(file) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n \n", "no names"),
        (b"a\nb\na\n", "'a' is listed twice"),
        (b"a -1\n", "'a -1'"),
        (b"\xff\xfe", "text"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, content, reason):
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    text = refusal(read_names, file)
    assert text.startswith(f"{file}: ") and reason in text


def test_a_missing_list_is_named(tmp_path):
    assert refusal(read_names, tmp_path / "train.txt").startswith(f"{tmp_path / 'train.txt'}: cannot be read")


# The dataset


def test_samples_are_the_files(pair):
    image, mask, name = FileSamples(images=[pair[0]], masks=[pair[1]])[0]
    assert torch.equal(image, read_image(pair[0])) and torch.equal(mask, read_mask(pair[1])) and name == "a"


def test_lookup_is_applied(pair):
    lookup = raw_lookup(LabelSet("own", ("x", "y", "z"), numbers=(0, 2, 3)))
    mask = FileSamples(images=[pair[0]], masks=[pair[1]], lookup=lookup)[0].mask
    expected = np.select([noise(channels=1, high=4) == k for k in range(4)], [0, IGNORE, 1, 2])
    assert np.array_equal(mask, expected)


def test_missing_files_are_counted_and_the_first_is_named(pair):
    folder = pair[0].parent
    images, masks = [folder / f"{name}.png" for name in "abc"], [pair[1]] * 3
    text = refusal(lambda: FileSamples(images=images, masks=masks))
    assert text.startswith(f"{folder / 'b.png'}: this image does not exist (2 of 3 images missing)")
    gone = folder / "nowhere" / "a.png"
    text = refusal(lambda: FileSamples(images=[pair[0]], masks=[gone]))
    assert text.startswith(f"{gone}: this mask does not exist")
    with pytest.raises(ValueError, match="3 images, but 1 masks"):
        FileSamples(images=images, masks=[pair[1]])


def test_paths_without_a_folder_are_looked_for_here(pair, monkeypatch):
    monkeypatch.chdir(pair[0].parent)
    assert FileSamples(images=["a.png"], masks=[Path("a_mask.png")])[0].name == "a"
    assert refusal(lambda: FileSamples(images=["b.png"], masks=["a_mask.png"])).startswith("b.png: ")


def test_different_sizes_name_both_files_and_sizes(pair):
    Image.fromarray(noise(20, 31)).save(pair[0])
    text = refusal(FileSamples(images=[pair[0]], masks=[pair[1]]).__getitem__, 0)
    assert f"{pair[0]} is 31×20" in text and f"{pair[1]} is 30×20" in text and "EXIF" not in text
    Image.fromarray(noise(30, 20)).save(pair[0])
    assert "EXIF" in refusal(FileSamples(images=[pair[0]], masks=[pair[1]]).__getitem__, 0)


def test_a_label_outside_the_class_list_names_the_mask_file(pair):
    lookup = raw_lookup(LabelSet("own", ("x", "y", "z")))
    text = refusal(FileSamples(images=[pair[0]], masks=[pair[1]], lookup=lookup).__getitem__, 0)
    assert text.startswith(f"{pair[1]}: label 3 is outside the class list (0..2 and 255)")


def test_names_match_in_every_unicode_form(tmp_path):
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / form
        folder.mkdir()
        for name in ("Übung", "cœur-é", "plain"):
            Image.fromarray(noise()).save(folder / f"{unicodedata.normalize(form, name)}.png")
        wanted = [folder / f"{unicodedata.normalize(other, name)}.png" for name in ("Übung", "plain", "cœur-é")]
        data = FileSamples(images=wanted, masks=[folder / "plain.png"] * 3)
        assert all(path.exists() for path in data.images) and read_image(data.images[0]).shape == (3, 20, 30)
        text = refusal(check_present, [*wanted, folder / "ö.png"], "image")
        assert text.startswith(f"{folder / 'ö.png'}: this image does not exist (1 of 4")


def test_a_list_that_repeats_a_name_in_another_form_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(["a", "\u00fc", "u\u0308"]))
    assert "is listed twice" in refusal(read_names, tmp_path / "train.txt")


def test_loader_workers_read_the_same(pair):
    data = FileSamples(images=[pair[0]] * 4, masks=[pair[1]] * 4, lookup=raw_lookup(LabelSet("own", tuple("wxyz"))))
    loader = DataLoader(data, num_workers=2, batch_size=None)
    assert all(torch.equal(sample.mask, data[0].mask) and sample.name == "a" for sample in loader)


def test_a_hundred_thousand_entries_are_light(tmp_path):
    for index in range(100):
        (tmp_path / f"{index:06d}.png").touch()
    paths = sorted(tmp_path.iterdir()) * 1000
    data = FileSamples(images=paths, masks=paths)
    assert len(data) == 100_000 and len(pickle.dumps(data)) < 20e6


# Real samples


@needs_samples
def test_voc_masks_lose_background_and_void_border():
    labels, colours = load_label_set("voc"), voc_colours()
    masks = sorted((SAMPLES / "voc2012/SegmentationClass").glob("*.png"))
    images = [SAMPLES / "voc2012/JPEGImages" / f"{mask.stem}.jpg" for mask in masks]
    data = FileSamples(images=images, masks=masks, lookup=raw_lookup(labels))
    for path, sample in zip(masks, data, strict=False):
        painted = np.asarray(Image.open(path).convert("RGB"))  # from the colours, not from the indices
        expected = np.full(painted.shape[:2], IGNORE)
        for index in range(20):
            expected[(painted == colours[index + 1]).all(2)] = index
        assert np.array_equal(sample.mask, expected) and sample.image.shape[1:] == sample.mask.shape
        assert (read_mask(path) == IGNORE).any() and len(sample.mask.unique()) > 1, "void border, and a class"
    names = {labels.classes[c] for c in data[[m.stem for m in masks].index("2011_000006")].mask.unique() if c != IGNORE}
    assert names == {"chair", "person", "sofa"}


@needs_samples
def test_sbd_masks_have_no_void_border():
    labels = load_label_set("voc")
    folder = SAMPLES / "voc2012"
    found = {}
    for path in sorted((folder / "SegmentationClassAug").glob("*.png")):
        data = FileSamples(images=[folder / f"JPEGImages/{path.stem}.jpg"], masks=[path], lookup=raw_lookup(labels))
        mask, raw = data[0].mask, read_mask(path)
        assert IGNORE not in raw and torch.equal(mask == IGNORE, raw == 0)
        found[path.stem] = {labels.classes[c] for c in mask.unique() if c != IGNORE}
    assert found == {"2008_007586": {"cow", "person"}, "2009_001196": {"horse"}, "2010_000743": {"train"}}


@needs_samples
def test_coco_raw_masks_close_their_gaps():
    labels, seen = load_label_set("coco-stuff"), set()
    kept = np.array([number for number in range(182) if number not in COCO_GAPS])
    masks = sorted((SAMPLES / "cocostuff164k/annotations").rglob("*.png"))
    images = [Path(str(mask).replace("annotations", "images")).with_suffix(".jpg") for mask in masks]
    for path, sample in zip(masks, FileSamples(images=images, masks=masks, lookup=raw_lookup(labels)), strict=False):
        raw = np.asarray(Image.open(path))
        expected = np.where(raw == IGNORE, IGNORE, np.searchsorted(kept, raw))
        assert np.array_equal(sample.mask, expected) and not set(np.unique(raw)) & COCO_GAPS
        seen |= set(sample.mask.unique().tolist())
    assert len(masks) == 17 and len(seen - {IGNORE}) > 50 and max(seen - {IGNORE}) < 171


CONTEXT = {
    "2008_008376": "bird grass ground water wood",
    "2009_000637": "background motorbike person grass ground sky",
    "2010_000682": "background bus car person building grass light road sidewalk sky tree",
    "2010_003321": "table dog person cloth floor wall",
}


@needs_samples
@pytest.mark.parametrize("stem", CONTEXT)
def test_context_masks_by_name_and_by_colour(stem):
    folder, colours = SAMPLES / "pascal_context", voc_colours()
    files = dict(images=[folder / f"JPEGImages/{stem}.jpg"], masks=[folder / f"derived_index_59order/{stem}.png"])
    for name in ("context-60", "context-59"):
        labels = load_label_set(name)
        mask = FileSamples(**files, lookup=raw_lookup(labels))[0].mask
        names = {labels.classes[c] for c in mask.unique() if c != IGNORE}
        assert names == set(CONTEXT[stem].split()) - ({"background"} if name == "context-59" else set())
        painted = torch.from_numpy(colours)[(mask.int() + (name == "context-59")) % 256]
        original = np.asarray(Image.open(folder / f"SegmentationClassContext/{stem}.png"))
        assert np.array_equal(painted[mask != IGNORE], original[mask != IGNORE])
        assert not original[(mask == IGNORE).numpy()].any(), "black is background"


@needs_samples
def test_coloured_context_masks_are_refused():
    path = SAMPLES / "pascal_context/SegmentationClassContext/2008_008376.png"
    assert str(path) in refusal(read_mask, path) and "3 channels" in refusal(read_mask, path)
