"""Templates of a recipe: they replace those of the dataset, and runs with others are told apart."""

import pytest
import torch

from sptseg.core import UserError
from sptseg.data.benchmarks import data_identity
from sptseg.evaluation.evaluate import load_parts
from sptseg.recipe import check_recipe, recipe_text

BASE = {"dataset": "glyphs-20", "image_size": 32, "train_images": 2, "val_images": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPTSEG_CACHE", str(tmp_path / "cache"))


def test_templates_replace_those_of_the_dataset():
    own, two = check_recipe(BASE), check_recipe(BASE, settings={"templates": ["a {}.", "the {} in the scene."]})
    (first, _, text), (second, _, other) = (load_parts(recipe) for recipe in (own, two))
    assert len(first.labels.templates) == 5 and second.labels.templates == two.templates == (
        "a {}.",
        "the {} in the scene.",
    )
    assert text.shape == other.shape == (20, 128) and not torch.equal(text, other)
    assert data_identity(first) != data_identity(second), "a run on other templates is another run"
    assert "templates" not in recipe_text(own) and "- the {} in the scene." in recipe_text(two)


@pytest.mark.parametrize("templates", [["a cat"], [], "a {}.", ["{} and {}"], [1]])
def test_templates_without_one_place_for_the_name_are_refused(templates):
    with pytest.raises(UserError, match="templates"):
        check_recipe({**BASE, "templates": templates})
