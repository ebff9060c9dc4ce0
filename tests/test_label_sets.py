"""Label sets, settings and the rule that unseen labels cannot reach training."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sptseg.core import IGNORE, UNSEEN, UserError, asset_path
from sptseg.data.label_sets import (
    INVALID,
    SETTINGS,
    LabelSet,
    label_to_train_id,
    load_label_set,
    raw_lookup,
    remap_labels,
    train_class_ids,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAIN_CASES = sorted((SHARED / "reference").glob("*_train_*.safetensors"))
TOY = LabelSet("toy", ("sky", "cat", "tree", "car", "road"), unseen=(1, 3))
COCO_UNSEEN = {
    **{19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors"},
    **{88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree"},
    160: "wall-concrete",
}
VOC_UNSEEN = {15: "pottedplant", 16: "sheep", 17: "sofa", 18: "train", 19: "tvmonitor"}


@pytest.mark.parametrize(("name", "count", "unseen"), [("voc", 20, VOC_UNSEEN), ("coco-stuff", 171, COCO_UNSEEN)])
def test_unseen_ids_and_names_agree_with_the_published_split(name, count, unseen):
    labels = load_label_set(name)
    assert len(labels.classes) == count == len(labels.seen) + len(labels.unseen)
    assert {index: labels.classes[index] for index in labels.unseen} == unseen


def test_templates_are_those_of_the_releases():
    assert load_label_set("voc").templates == ("a photo of a {}",)
    templates = load_label_set("coco-stuff").templates
    assert len(set(templates)) == 15 and all(template.endswith(".") for template in templates)
    assert templates[0] == "a photo of a {}." and templates[-1] == "This is one {} in the scene."


def test_context_with_and_without_background_differ_by_the_background():
    with_background, without = load_label_set("context-60"), load_label_set("context-59")
    assert with_background.classes == ("background", *without.classes) and len(without.classes) == 59


def test_coco_raw_values_skip_the_gaps_and_keep_their_order():
    lookup = raw_lookup(load_label_set("coco-stuff"))
    gaps = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert (lookup[gaps] == IGNORE).all() and lookup[IGNORE] == IGNORE
    used = [value for value in range(182) if value not in gaps]
    assert lookup[used].tolist() == list(range(171)) and (lookup[182:IGNORE] == INVALID).all()


def test_a_mapping_gives_the_lookup_of_the_numbers_that_it_leaves_out(tmp_path):
    coco, file = load_label_set("coco-stuff"), tmp_path / "own.yaml"
    gaps = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    expected = torch.full((256,), INVALID, dtype=torch.uint8)
    expected[[*gaps, IGNORE]] = IGNORE
    expected[[number for number in range(182) if number not in gaps]] = torch.arange(171, dtype=torch.uint8)
    assert torch.equal(raw_lookup(coco), expected) and coco.unused_numbers == tuple(gaps)
    file.write_text("classes: {7: cat, 2: dog}")
    own = load_label_set(file)
    assert own.classes == ("cat", "dog") and raw_lookup(own)[:9].tolist() == [255, 255, 1, 255, 255, 255, 255, 0, 253]
    file.write_text("classes: {0: cat, 1: dog}")
    assert torch.equal(raw_lookup(load_label_set(file)), raw_lookup(LabelSet("list", ("cat", "dog"))))


def test_voc_raw_values_reduce_by_one():
    lookup = raw_lookup(load_label_set("voc"))
    assert lookup[:21].tolist() == [IGNORE, *range(20)] and lookup[21] == INVALID


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ({"classes": []}, "classes: the list is empty"),
        ({}, "classes: the list is empty"),
        ({"classes": ["cat", "cat"]}, "'cat' and 'cat' are the same name"),
        ({"classes": ["cat", ""]}, "name 2 of 2 is empty"),
        ({"classes": {1: "cat", 2: " \u00a0\u200b"}}, "name 2 of 2 is empty"),
        ({"classes": ["stop sign", " stop \u2003sign "]}, "'stop sign' and ' stop \\u2003sign ' are the same name"),
        ({"classes": ["\u00e9t\u00e9", "e\u0301t\u00e9"]}, "'\\xe9t\\xe9' and 'e\\u0301t\\xe9' are the same name"),
        ({"classes": ["cat", "dog"], "unseen": ["dgo"]}, "['dgo']"),
        ({"classes": ["cat", "dog"], "unseen": ["dog", "dog"]}, "['dog']"),
        ({"classes": ["cat", "dog"], "seen": ["cat", "dog"], "unseen": ["dog"]}, "['dog'] listed as both"),
        ({"classes": ["cat", "dog"], "seen": ["cat"]}, "['dog'] in neither"),
        ({"classes": ["cat", "dog"], "unseen": ["cat", "dog"]}, "every class"),
        ({"classes": ["cat", 3]}, "[3]"),
        ({"classes": "cat"}, "'cat'"),
        ({"classes": ["cat"], "templates": ["a photo"]}, "['a photo']"),
        ({"classes": ["cat", None, True]}, "[None, True]; put names in quotes"),
        ({"classes": None}, "classes: must be a list of names, found nothing"),
        ({"classes": ["cat"], "unseen": False}, "unseen: must be a list of names, found False; write [] for none"),
        ({"classes": ["cat"], "templates": None}, "templates: must be a list of names, found nothing"),
        ({"classes": {False: "cat"}}, "[False]"),
        ({"classes": ["cat"], "name": False}, "name: False is not a string"),
        ({"classes": {65533: "cat"}}, "[65533]"),
        ({"classes": {"1": "cat"}}, "['1']"),
        ({"classes": {1: 2}}, "[2]"),
        ({"classes": ["cat"], "raw_gaps": [0]}, "`classes: {1: cat, 2: dog}`"),
        ({"classes": [f"c{index}" for index in range(65534)]}, "65534 names"),
        ({"classes": ["cat"], "colour": "red"}, "['colour']"),
    ],
)
def test_impossible_files_name_file_key_and_value_in_one_line(tmp_path, content, culprit):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as error:
        load_label_set(file)
    assert str(file) in str(error.value) and culprit in str(error.value) and "\n" not in str(error.value)


def test_names_are_normalised_wherever_a_label_set_is_built(tmp_path):
    file, names = tmp_path / "own.yaml", ["cafe\u0301", "  stop\t sign ", "\u0e41\u0e21\u0e27", "Cat", "cat"]
    file.write_text(yaml.safe_dump({"classes": names, "unseen": ["caf\u00e9", "stop sign"]}))
    expected = ("caf\u00e9", "stop sign", "\u0e41\u0e21\u0e27", "Cat", "cat")
    assert load_label_set(file).classes == expected == LabelSet("own", tuple(names)).classes
    assert load_label_set(file).unseen == (0, 1)
    file.write_text(yaml.safe_dump({"classes": names[:2], "seen": ["stop  sign"], "unseen": ["cafe\u0301 "]}))
    assert load_label_set(file).unseen == (0,)


@pytest.mark.parametrize("file", sorted(asset_path("label_sets").glob("*.yaml")), ids=lambda file: file.stem)
def test_names_of_the_benchmarks_are_kept_as_they_are(file):
    classes = yaml.safe_load(file.read_text())["classes"]
    assert load_label_set(file).classes == tuple(classes.values() if isinstance(classes, dict) else classes)


def test_names_that_are_not_texts_are_refused():
    with pytest.raises(UserError, match="label set 'own': classes: 3 is not a text"):
        LabelSet("own", ("cat", 3))


def test_a_number_with_two_names_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("classes:\n  1: cat\n  2: dog\n  1: cow\n")
    with pytest.raises(UserError, match=r"own.yaml: 1 is given twice, in lines 2 and 4"):
        load_label_set(file)


def test_ids_out_of_range_unknown_sets_and_settings_are_refused():
    with pytest.raises(UserError, match=r"ids \[2, -1\] outside 0\.\.1"):
        LabelSet("toy", ("cat", "dog"), unseen=(2, -1))
    with pytest.raises(UserError, match="'vok' does not exist; use one of .*voc"):
        load_label_set("vok")
    with pytest.raises(UserError, match="'zero-shot' is unknown"):
        label_to_train_id(TOY, "zero-shot")
    with pytest.raises(UserError, match="cannot be read"):
        load_label_set("/nowhere/own.yaml")


def test_lookup_tables():
    assert label_to_train_id(TOY, "inductive")[:6].tolist() == [0, IGNORE, 1, IGNORE, 2, INVALID]
    assert label_to_train_id(TOY, "transductive")[:6].tolist() == [0, UNSEEN, 2, UNSEEN, 4, INVALID]
    assert label_to_train_id(TOY, "supervised")[:6].tolist() == [0, 1, 2, 3, 4, INVALID]
    for setting in SETTINGS:
        lookup = label_to_train_id(TOY, setting)
        assert lookup[IGNORE] == IGNORE and (lookup[5:IGNORE] == INVALID).all()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["voc", "coco-stuff"])
def test_every_seen_label_points_at_its_own_text_row(name, setting):
    labels = load_label_set(name)
    rows, lookup = train_class_ids(labels, setting), label_to_train_id(labels, setting)
    assert all(rows[lookup[index]] == index for index in labels.seen)
    assert len(rows) == (len(labels.seen) if setting == "inductive" else len(labels.classes))


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_repainting_unseen_pixels_changes_nothing(setting):
    generator = torch.Generator().manual_seed(1)
    labels = load_label_set("coco-stuff")
    mask = torch.randint(0, 171, (64, 64), generator=generator, dtype=torch.uint8)
    unseen = torch.tensor(labels.unseen, dtype=torch.uint8)
    other = unseen[torch.randint(len(unseen), mask.shape, generator=generator)]
    repainted = torch.where(torch.isin(mask, unseen), other, mask)
    lookup = label_to_train_id(labels, setting)
    assert not torch.equal(mask, repainted)
    assert torch.equal(remap_labels(mask, lookup), remap_labels(repainted, lookup))


@pytest.mark.parametrize("value", [5, 200, INVALID, UNSEEN])
def test_a_label_outside_the_class_list_names_the_mask_and_the_value(value):
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[1, 2] = value
    with pytest.raises(UserError, match=rf"2007_000039: label {value} is outside the class list \(0\.\.4 and 255\)"):
        remap_labels(mask, label_to_train_id(TOY, "inductive"), "2007_000039")


def test_masks_that_are_not_bytes_are_refused():
    with pytest.raises(UserError, match="a.png: the mask has type torch.int64"):
        remap_labels(torch.zeros(2, 2, dtype=torch.int64), label_to_train_id(TOY, "inductive"), "a.png")


@pytest.mark.skipif(not TRAIN_CASES, reason="reference vectors are not here")
@pytest.mark.parametrize("file", TRAIN_CASES, ids=lambda file: file.stem)
def test_labels_equal_those_of_the_authors_code(file):
    case = load_file(file)
    table, label = case["output.visibility_seen_mask"], case["input.label"].to(torch.uint8)
    setting, code = ("inductive", IGNORE) if file.stem.endswith("inductive") else ("transductive", UNSEEN)
    lookup = label_to_train_id(TOY, setting)
    assert torch.equal(torch.where(table[:5] == -1, code, table[:5]).to(torch.uint8), lookup[:5])
    ours = remap_labels(label, lookup)
    after = case["output.label_after_remap"]
    assert torch.equal(torch.where(after == -1, code, after).to(torch.uint8), ours)
    known = ours != UNSEEN
    assert torch.equal(case["output.label_to_loss"].to(torch.uint8)[known], ours[known])
    if setting == "transductive":
        assert set(case["output.label_to_loss"][~known].tolist()) <= set(TOY.unseen)


@pytest.mark.skipif(not (SHARED / "text_embeddings").exists(), reason="text embeddings are not here")
@pytest.mark.parametrize(("file", "name"), [("voc12_single", "voc"), ("coco_multi", "coco-stuff")])
def test_released_text_embeddings_have_one_row_per_class(file, name):
    import numpy

    assert len(numpy.load(SHARED / "text_embeddings" / f"{file}.npy")) == len(load_label_set(name).classes)


@pytest.mark.skipif(not (SHARED / "samples").exists(), reason="sample masks are not here")
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("cocostuff164k/annotations", "coco-stuff"),
        ("voc2012/SegmentationClass", "voc"),
        ("pascal_context/derived_index_59order", "context-59"),
        ("pascal_context/derived_index_59order", "context-60"),
    ],
)
def test_sample_masks_hold_only_known_labels(folder, name):
    import numpy
    from PIL import Image

    files = sorted((SHARED / "samples" / folder).rglob("*.png"))
    assert files
    for file in files:
        mask = torch.from_numpy(numpy.array(Image.open(file)))
        ids = remap_labels(mask, raw_lookup(load_label_set(name)), file.name)
        remap_labels(ids, label_to_train_id(load_label_set(name), "supervised"), file.name)
