"""Labels of any image by any names: equal to the evaluation's, the same through every way in, refused in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sptseg
from sptseg.core import UserError, asset_path
from sptseg.data.benchmarks import load_benchmark
from sptseg.evaluation.evaluate import eval_loader, load_model
from sptseg.inference.predictor import shipped_models
from sptseg.inference.results import none_label
from sptseg.recipe import load_recipe

NAMES = ["red heart", "green cat", "yellow knight"]
EXAMPLES = sorted(asset_path("examples").glob("*.png"))
RECORDS = asset_path("results/table1/glyphs-20")


@pytest.fixture(scope="module")
def model():
    return sptseg.load("spt-seg-glyphs", device="cpu")


@pytest.mark.parametrize("method", ["spt-seg", "zegclip"])
def test_shipped_models_label_test_images_as_the_evaluation_does(method, one_thread):
    recipe = load_recipe(f"table1/glyphs-20/{method}", val_images=12)
    benchmark, _, predict = load_model(recipe, shipped_models()[f"{method}-glyphs"])
    model = sptseg.load(f"{method}-glyphs", device="cpu")
    assert model.classes == benchmark.labels.classes and len(model.unseen) == 5
    images = [benchmark.val[index].image for index in range(12)]
    together = model.predict(images)
    for result, sample, (image, mask, _) in zip(
        together, images, eval_loader(benchmark, recipe.image_size), strict=True
    ):
        expected = predict(image, tuple(mask.shape[-2:])).cpu().numpy()
        alone = model.predict(sample)
        assert (alone.labels == expected).all() and alone.labels.dtype == np.uint8
        assert (result.labels != expected).mean() < 0.001, "in a batch, sums may be rounded differently"


@pytest.mark.parametrize("method", ["spt-seg", "zegclip"])
def test_shipped_models_carry_the_record_of_table_1(method):
    record = json.loads((RECORDS / method / "seed0.json").read_text())
    model = sptseg.load(f"{method}-glyphs", device="cpu")
    assert model.metrics == record["metrics"] and model.notes.provenance["versions"] == record["versions"]
    assert model.notes.missing() == [] and model.notes.setting == "inductive"


def test_examples_are_test_images():
    scenes = load_benchmark("glyphs-20", size=96, seed=0).val
    drawn = {scenes[index].image.permute(1, 2, 0).numpy().tobytes() for index in range(12)}
    assert len(EXAMPLES) == 4 and all(np.asarray(Image.open(path)).tobytes() in drawn for path in EXAMPLES)


def test_features_kept_by_encode_give_the_same_labels(model):
    kept = model.encode(EXAMPLES[0])
    for names in (NAMES, None, ["purple star", "green heart"]):
        assert (model.predict(kept, names).labels == model.predict(EXAMPLES[0], names).labels).all()


def test_scores_are_those_behind_the_labels(model):
    result = model.predict(EXAMPLES[1], scores=True)
    assert result.scores.shape == (20, 96, 96) and (result.scores.argmax(0) == result.labels).all()
    assert (result.score("red heart") == result.scores[result.classes.index("red heart")]).all()
    with pytest.raises(UserError, match="scores=True"):
        _ = model.predict(EXAMPLES[1]).scores


def test_threshold_leaves_pixels_without_a_class(model):
    whole, part = model.predict(EXAMPLES[1], scores=True), model.predict(EXAMPLES[1], threshold=0.2)
    low = whole.scores.max(0) < np.float32(0.2)
    assert 0 < low.sum() < low.size and (part.labels[low] == 255).all() and (part.labels == whole.labels)[~low].all()
    assert part.none == 255 and none_label(256) == 65535


def test_the_bias_lowers_names_seen_in_training_and_only_beside_others(model):
    seen = "green heart"
    assert seen not in model.unseen and "green cat" in model.unseen
    mixed = {bias: model.predict(EXAMPLES[1], [seen, "green cat"], seen_bias=bias, scores=True) for bias in (0, 0.3)}
    assert np.allclose(mixed[0].score(seen) - mixed[0.3].score(seen), 0.3, atol=1e-6)
    assert (mixed[0].score("green cat") == mixed[0.3].score("green cat")).all()
    alone = [model.predict(EXAMPLES[1], [seen, "yellow star"], seen_bias=bias, scores=True) for bias in (0, 0.3)]
    assert (alone[0].scores == alone[1].scores).all()


REFUSED = {
    "no classes": (lambda model: model.predict(EXAMPLES[0], []), "no names"),
    "a name twice": (lambda model: model.predict(EXAMPLES[0], ["red cat", "red  cat"]), "'red cat' is named twice"),
    "a text": (lambda model: model.predict(EXAMPLES[0], "red cat"), r"\['red cat'\]"),
    "an unknown word": (lambda model: model.predict(EXAMPLES[0], ["zeppelin"]), "does not know"),
    "equal to CLIP": (lambda model: model.predict(EXAMPLES[0], ["red cat", "Red cat"]), "apart"),
    "a wrong threshold": (lambda model: model.predict(EXAMPLES[0], threshold=2), "threshold: 2"),
    "a wrong bias": (lambda model: model.predict(EXAMPLES[0], seen_bias="x"), "seen_bias: 'x'"),
    "a template without a place": (lambda model: model.predict(EXAMPLES[0], templates=["a photo"]), "'a photo'"),
    "no file": (lambda model: model.predict("nowhere.png"), "nowhere.png: cannot be read"),
    "an unknown model": (lambda model: sptseg.load("spt-seg-glyph"), "did you mean 'spt-seg-glyphs'"),
    "a normalised tensor": (lambda model: model.predict(torch.randn(3, 8, 8)), "0..1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(model, case):
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_list_of_kept_and_new_images_keeps_its_order(model):
    mixed = model.predict([EXAMPLES[0], model.encode(EXAMPLES[1]), EXAMPLES[2]], NAMES)
    assert [result.stem for result in mixed] == [path.stem for path in EXAMPLES[:3]]
    assert model.predict([], NAMES) == []
