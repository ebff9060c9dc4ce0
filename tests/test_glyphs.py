"""Glyph Scenes: the same image for the same (split, seed, index), always, and masks that tell the truth."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sptseg.core import IGNORE, UserError, asset_path, read_yaml
from sptseg.data.glyphs import (
    GROUND_NAMES,
    THING_NAMES,
    THINGS,
    WORDINGS,
    GlyphScenes,
    caption,
    captioned_scene,
    draw_scene,
    pictogram,
    scene_rng,
)
from sptseg.training.pretrain import NAMES, image_vectors, make_pool, name_loss, patch_loss


def scenes(**changes):
    return GlyphScenes(**{"label_set": "glyphs-20", "split": "val", "length": 12, **changes})


def test_images_depend_on_nothing_but_split_seed_and_index():
    first = [scenes()[index] for index in range(12)]
    np.random.seed(3)
    torch.manual_seed(5)
    pictogram.cache_clear()
    loader = DataLoader(scenes(length=40), batch_size=None, num_workers=2, sampler=reversed(range(12)))
    for one, other in zip(first, reversed(list(loader)), strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask) and one.name == other.name


def test_images_change_with_split_seed_and_index():
    kinds = [scenes(), scenes(split="train"), scenes(seed=1), scenes(split="train", seed=1)]
    images = {kind[index].image.numpy().tobytes() for kind in kinds for index in range(12)}
    assert len(images) == 48
    assert not torch.equal(make_pool(1, 96, (2, 4), (0.4, 0.65), seed=0).images[0], scenes()[0].image)


def test_items_have_the_promised_form():
    for size in (64, 96, 130):
        sample = scenes(size=size)[-1]
        assert sample.image.shape == (3, size, size) and sample.mask.shape == (size, size)
        assert sample.image.dtype == sample.mask.dtype == torch.uint8
    with pytest.raises(IndexError):
        scenes()[12]
    assert len(list(scenes())) == 12


def test_glyphs_20_leaves_the_ground_unlabelled_and_stuff_labels_all():
    masks = torch.stack([sample.mask for sample in scenes()])
    assert 0.3 < (masks == IGNORE).float().mean() < 0.9 and masks[masks != IGNORE].max() < 20
    masks = torch.stack([sample.mask for sample in scenes(label_set="glyphs-stuff")])
    assert masks.max() < 48


def test_every_class_occurs_in_both_splits():
    for split in ("train", "val"):
        found = torch.cat([sample.mask.unique() for sample in scenes(split=split, length=150)]).unique()
        assert set(range(20)) <= set(found.tolist())


def test_masks_follow_the_colours():
    hues = {"red": 0, "green": 1, "blue": 2}
    for colour, channel in hues.items():
        image, layers = draw_scene([f"{colour} cat"], ["grey wall"], 96, np.random.default_rng(channel))
        body = image[layers == 1].astype(float).mean(0)
        assert body.argmax() == channel and body.max() > 1.3 * np.sort(body)[1]
        ground = image[layers == 0].astype(float)
        assert np.ptp(ground.mean(0)) < 12, "the ground is grey"


def test_later_things_cover_earlier_ones():
    for index in range(20):
        rng = np.random.default_rng(index)
        _, layers = draw_scene(["red cat", "blue cat", "green cat"], ["grey wall"], 96, rng, spans=(0.9, 0.9))
        rng = np.random.default_rng(index)
        _, before = draw_scene(["red cat", "blue cat"], ["grey wall"], 96, rng, spans=(0.9, 0.9))
        assert (layers[layers < 3] == before[layers < 3]).all()


def test_all_things_differ_in_shape():
    shapes = [np.asarray(pictogram(thing, 64))[..., 0] > 127 for thing in THINGS]
    for index, shape in enumerate(shapes):
        assert 0.15 < shape.mean() < 0.9
        for other in shapes[:index]:
            assert (shape & other).sum() / (shape | other).sum() < 0.8


@pytest.mark.parametrize("name", ["glyphs-20", "glyphs-stuff"])
def test_unseen_classes_are_new_combinations_of_seen_words(name):
    label_set = read_yaml(asset_path(f"label_sets/{name}.yaml"))
    classes, unseen = label_set["classes"], label_set["unseen"]
    seen = set(classes) - set(unseen)
    assert len(set(classes)) == len(classes) and set(unseen) < set(classes) and set(classes) <= set(NAMES)
    colours, things = {name.split()[0] for name in seen}, {name.split()[1] for name in seen}
    assert all(name.split()[0] in colours and name.split()[1] in things for name in unseen)
    assert tuple(label_set["templates"]) == WORDINGS


@pytest.mark.parametrize(
    "changes, culprit",
    [({"split": "test"}, "test"), ({"length": 0}, "length 0"), ({"size": 8}, "size 8"), ({"seed": -1}, "seed -1")],
)
def test_bad_arguments_are_named(changes, culprit):
    with pytest.raises(UserError, match=culprit):
        scenes(**changes)


def test_captions_name_what_is_visible_and_nothing_else():
    for index in range(30):
        image, things, grounds = captioned_scene(scene_rng(0, "pretrain", index), 48)
        assert image.shape == (3, 48, 48) and 1 <= len(grounds) <= 2 and len(things) <= 4
        text = caption(things, grounds, WORDINGS[index % 5])
        named = {name for name in THING_NAMES + GROUND_NAMES if name in text}
        assert named == {*things, *grounds}


def test_losses_prefer_the_right_names():
    named = torch.zeros(2, len(NAMES)).bool()
    named[0, :2] = named[1, 5] = True
    right, wrong = named.float() * 5, (~named).float() * 5
    assert name_loss(right, named) < name_loss(wrong, named)
    assert patch_loss(right[:, None].expand(-1, 4, -1), named) < patch_loss(wrong[:, None].expand(-1, 4, -1), named)


def test_the_tiny_clip_recognises_things_it_has_not_been_shown_here():
    folder = asset_path("glyph_clip")
    clip = open_clip.CLIP(**json.loads((folder / "config.json").read_text())).eval()
    clip.load_state_dict(load_file(folder / "model.safetensors"))
    pool = make_pool(400, 96, (1, 1), (0.4, 0.65), seed=77)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=clip.context_length)
    with torch.no_grad():
        names = clip.encode_text(tokenizer([caption([name]) for name in THING_NAMES]), normalize=True)
        for count in (1, 2):
            answer = (image_vectors(clip, pool.images, count)[0] @ names.T).argmax(1)
            assert pool.named[torch.arange(400), answer].float().mean() > 0.87
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
