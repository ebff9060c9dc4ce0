"""One's own images: what is read, and that every mistake in the folder is named."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sptseg.core import IGNORE, UserError
from sptseg.data.folder import folder_labels, folder_samples

CLASSES = {"classes": {1: "cat", 2: "dog", 3: "cow"}, "unseen": ["cow"]}


def draw(seed, high=256, channels=3):
    shape = (20, 30, channels) if channels > 1 else (20, 30)
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    "Images b.JPG, a.png, c.webp in train, d.jpeg in val; masks with numbers 0..3."
    for split, files in (("train", ("b.JPG", "a.png", "c.webp")), ("val", ("d.jpeg",))):
        for kind in ("images", "masks"):
            (tmp_path / "own" / kind / split).mkdir(parents=True)
        for file in files:
            Image.fromarray(draw(ord(file[0]))).save(tmp_path / "own/images" / split / file)
            mask = Image.fromarray(draw(ord(file[0]), 4, 1))
            mask.save(tmp_path / "own/masks" / split / f"{file[0]}.png")
    (tmp_path / "own/classes.yaml").write_text(yaml.safe_dump(CLASSES))
    return tmp_path / "own"


def refusal(root, split="train"):
    with pytest.raises(UserError) as error:
        list(folder_samples(root, split))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_come_in_the_order_of_names_with_their_own_masks(root):
    samples = list(folder_samples(root, "train"))
    assert [sample.name for sample in samples] == ["a", "b", "c"] and len(folder_samples(root, "val")) == 1
    assert np.array_equal(samples[0].image.permute(1, 2, 0), draw(ord("a")))
    for sample in samples:
        numbers = torch.from_numpy(draw(ord(sample.name), 4, 1))
        assert torch.equal(sample.mask, torch.where(numbers == 0, IGNORE, numbers - 1))


def test_without_gaps_the_numbers_are_class_ids(root):
    (root / "classes.yaml").write_text("classes: [ground, cat, dog, cow]\nname: farm")
    assert folder_labels(root).name == "farm" and folder_labels(root).unseen == ()
    assert np.array_equal(folder_samples(root, "train")[0].mask, draw(ord("a"), 4, 1))


def test_the_label_set_is_named_after_the_folder(root):
    assert folder_labels(root).name == "own" and folder_labels(str(root)).unseen == (2,)


def test_files_of_other_programs_are_passed_over(root):
    for name in ("images/train/.DS_Store", "images/train/._a.jpg", "images/train/Thumbs.db", "masks/train/notes.txt"):
        (root / name).write_bytes(b"x")
    assert len(folder_samples(root, "train")) == 3


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_and_empty_folders_are_named(root, split, kind):
    folder = root / kind / split
    for path in folder.iterdir():
        path.unlink()
    assert refusal(root, split).startswith(f"{folder}: holds nothing")
    (folder / "a.heic").touch()
    assert "only a.heic and the like" in refusal(root, split)
    shutil.rmtree(folder)
    assert refusal(root, split).startswith(f"{folder}: this folder does not exist")


def test_a_missing_val_does_not_stop_train(root):
    shutil.rmtree(root / "images/val")
    assert len(folder_samples(root, "train")) == 3


def test_images_without_masks_and_masks_without_images(root):
    mask, image = root / "masks/train/b.png", root / "images/train/b.JPG"
    mask.rename(root / "masks/b.png")
    text = refusal(root)
    assert text.startswith(f"{image}: its mask {mask} does not exist (1 of 3") and "add it" in text
    (root / "masks/b.png").rename(root / "masks/train/b_mask.png")
    assert "b_mask.png is there; save it as b.png" in refusal(root)
    (root / "masks/train/b_mask.png").rename(root / "masks/train/b.jpg")
    assert "b.jpg is there; save it as b.png" in refusal(root)
    (root / "masks/train/b.jpg").rename(mask)
    image.unlink()
    assert refusal(root).startswith(f"{mask}: there is no image of this name (1 of 3")


def test_a_similar_name_that_has_its_own_image_is_no_hint(root):
    (root / "masks/train/b.png").unlink()
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        Image.fromarray(draw(0, 4, 1)).save(root / kind / f"train/b1.{ending}")
    assert "b1.png" not in refusal(root)


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPE", "tif", "bmp"])
def test_all_suffixes_of_images_are_read(root, ending):
    image = root / "images/train/a.png"
    Image.open(image).convert("RGB").save(root / f"images/train/a.{ending}", quality=100)
    image.unlink()
    assert [sample.name for sample in folder_samples(root, "train")] == ["a", "b", "c"]


def test_subfolders_pair_with_subfolders(root):
    for kind, ending, channels in (("images", "jpg", 3), ("masks", "png", 1)):
        for number, sub in enumerate(("north", "south/far", ".hidden")):
            (root / kind / "train" / sub).mkdir(parents=True)
            Image.fromarray(draw(number, 4, channels)).save(root / kind / "train" / sub / f"a.{ending}")
    data = folder_samples(root, "train")
    assert [sample.name for sample in data] == ["a", "b", "c", "north/a", "south/far/a"]
    assert torch.equal(data[4].mask, torch.from_numpy(draw(1, 4, 1)).sub(1))
    (root / "masks/train/south/far/a.png").rename(root / "masks/train/south/a.png")
    wanted = root / "masks/train/south/far/a.png"
    assert refusal(root).startswith(
        f"{root / 'images/train/south/far/a.jpg'}: its mask {wanted} does not exist (1 of 5"
    )


def test_names_that_differ_in_their_unicode_form_are_pairs(root):
    (root / "images/train/a.png").rename(root / "images/train/u\u0308.png")
    (root / "masks/train/a.png").rename(root / "masks/train/\u00fc.png")
    assert [sample.name for sample in folder_samples(root, "train")] == ["b", "c", "\u00fc"]
    Image.fromarray(draw(0)).save(root / "images/train/\u00fc.jpg")
    assert "has the same name" in refusal(root)


def test_two_images_of_one_name(root):
    Image.fromarray(draw(0)).save(root / "images/train/b.png")
    text = refusal(root)
    assert "b.JPG" in text and "b.png" in text and "same name" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("classes: [cat]\nunseen: [cta]", "'cta'"),
        ("classes: []", "the list is empty"),
        ("clases: [cat]", "'clases'"),
        ("- cat", "found list"),
        ("classes: [cat", "not valid YAML"),
    ],
)
def test_wrong_class_lists_are_named(root, content, reason):
    (root / "classes.yaml").write_text(content)
    text = refusal(root)
    assert text.startswith(f"{root / 'classes.yaml'}: ") and reason in text


def test_missing_class_list_missing_root_unknown_split(root):
    (root / "classes.yaml").unlink()
    assert refusal(root).startswith(f"{root / 'classes.yaml'}: does not exist")
    assert refusal(root / "nowhere").startswith(f"{root / 'nowhere'}: this folder does not exist")
    assert refusal(root, "test").startswith("split: 'test' is unknown; use train or val")


def test_numbers_beyond_the_list_and_masks_of_colours_name_the_mask(root):
    mask = root / "masks/train/c.png"
    Image.fromarray(np.full((20, 30), 4, np.uint8)).save(mask)
    assert refusal(root).startswith(f"{mask}: label 4 is outside the class list")
    Image.fromarray(draw(0)).save(mask)
    assert refusal(root).startswith(f"{mask}: holds colours (3 channels)")
    Image.fromarray(draw(0, 4, 1)[:10]).save(mask)
    assert "c.webp is 30×20" in refusal(root) and f"{mask} is 30×10" in refusal(root)
