"""The papermill notebooks, run as a user runs them."""

import json
from pathlib import Path

import papermill
import pytest

from sptseg.recipe import Recipe, check_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "nbs/runs"


def run_notebook(name, folder, **parameters):
    """Execute a notebook from a folder that is not the checkout; returns the path of the executed one."""
    executed = folder / f"{name}.ipynb"
    papermill.execute_notebook(RUNS / f"{name}.ipynb", executed, parameters, cwd=folder, progress_bar=False)
    return executed


def test_parameters_of_train_are_the_keys_of_a_recipe():
    parameters = papermill.inspect_notebook(RUNS / "train.ipynb")
    assert parameters.keys() - {"out", "record"} == Recipe.model_fields.keys()


def test_what_a_recipe_does_not_name_has_its_default(tmp_path):
    given = {"dataset": "glyphs-20", "image_size": 32, "iterations": 1, "batch_size": 2, "val_images": 1}
    run_notebook("train", tmp_path, out="run", **given)
    used = json.loads((tmp_path / "run/results.json").read_text())["recipe"]
    assert used == check_recipe(given).model_dump(mode="json") and used["train_images"] is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    executed = run_notebook("train", folder, out="run", record="records/row.json", iterations=130, eval_every=65)
    return folder / "run", executed


def test_train_notebook_leaves_results_weights_and_images(trained):
    run, executed = trained
    results = json.loads((run / "results.json").read_text())
    expected = load_recipe("demo/smoke", iterations=130, eval_every=65)
    assert results["recipe"] == expected.model_dump(mode="json"), "without a dataset: the smoke recipe"
    assert results["metrics"]["IoU"].keys() == set(results["metrics"]["IoU"]) and results["commit"]
    assert (run / "model.safetensors").exists() and (run / "images.png").exists()
    assert "image/png" in executed.read_text(), "the executed notebook shows images"


def test_the_record_of_a_run_has_every_evaluation_and_some_losses(trained):
    run, _ = trained
    results, record = (json.loads(path.read_text()) for path in (run / "results.json", run.parent / "records/row.json"))
    history = record.pop("history"), results.pop("history")
    assert record == results and history[0]["val"] == history[1]["val"] and len(history[0]["val"]) == 2
    assert len(history[0]["train"]) <= 100 and history[0]["train"] == history[1]["train"][::2]


def test_evaluate_notebook_finds_what_training_found(trained, tmp_path):
    run, _ = trained
    run_notebook("evaluate", tmp_path, run=str(run), out="evaluation.json")
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert evaluated == json.loads((run / "results.json").read_text())["metrics"]


def test_demo_compares_both_methods_over_seeds(tmp_path):
    overrides = {"image_size": 48, "iterations": 2, "val_images": 4, "eval_every": 2, "num_prompts": 2}
    run_notebook("demo", tmp_path, out="demo", seeds=[0, 1], overrides=overrides)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    expected = {f"{method}, seed {seed}" for method in ("zegclip", "spt-seg") for seed in (0, 1)}
    assert results["metrics"].keys() == expected | {"training-free CLIP"}
    assert {path.name for path in (tmp_path / "demo").glob("*.png")} == {"classes.png", "curves.png", "images.png"}


def test_a_mistake_in_the_parameters_stops_the_notebook_before_training(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="decoder_layers"):
        run_notebook("train", tmp_path, out="run", decoder_layers=0)
    assert not (tmp_path / "run").exists()
