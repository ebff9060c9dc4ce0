"""The papermill notebooks, run as a user runs them."""

import json
from pathlib import Path

import papermill
import pytest
from nbclient.exceptions import CellExecutionError

from sptseg.core import UserError, check_parameters
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
    assert parameters.keys() - {"recipe_file", "out", "record"} == Recipe.model_fields.keys()


def test_what_a_recipe_does_not_name_has_its_default(kernel, tmp_path):
    given = {"dataset": "glyphs-20", "image_size": 32, "iterations": 1, "batch_size": 2, "val_images": 1}
    kernel("train", tmp_path, out="run", **given)
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


def test_evaluate_notebook_finds_what_training_found(kernel, trained, tmp_path):
    run, _ = trained
    kernel("evaluate", tmp_path, run=str(run), out="evaluation.json")
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


MISTAKES = {  # notebook: (parameters, what the one line must say)
    "a misspelt key": ("train", {"iteratons": 3}, "unknown parameter 'iteratons'; did you mean 'iterations'?"),
    "a list that is none": ("tables", {"seeds": 3}, "seeds: must be list, found 3"),
    "text for a number": ("complexity", {"repeats": "often"}, "repeats: must be int, found 'often'"),
    "a truth value for a number": ("benchmark", {"threads": True}, "threads: must be int, found True"),
    "a number for text": ("evaluate", {"run": 2012}, "run: must be str, found 2012; for text, use `-r run VALUE`"),
    "nothing for a list": ("figures", {"seeds": None}, "seeds: must be list, found None"),
    "a key of another notebook": ("demo", {"recipe": "demo/smoke"}, "did you mean 'recipes'?"),
    "an unlike key": (
        "evaluate",
        {"zzz": 1},
        "data_root, val_images, mixed_precision, out",
    ),
    "nothing for prompts": ("train", {"spectral_blocks": None}, "spectral_blocks: no value is given; write none"),
    "a wrong value": ("train", {"batch_size": 0, "lr": "1e-3"}, "batch_size=0: input should be greater than 0"),
    "a recipe that does not exist": ("train", {"recipe_file": "demo/sptseg"}, "did you mean 'demo/spt-seg'?"),
    "a recipe in a list": ("demo", {"recipes": ["demo/zegclp"]}, "did you mean 'demo/zegclip'?"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_a_notebook_does_not_know_is_refused_in_one_line(kernel, tmp_path, case):
    name, parameters, expected = MISTAKES[case]
    with pytest.raises(CellExecutionError) as error:
        kernel(name, tmp_path, **parameters)
    assert expected in error.value.evalue and not (tmp_path / "run").exists()
    cells = json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"]
    [shown] = [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert shown["traceback"] == [f"UserError: {error.value.evalue}"]


BAD_FILES = [("seed: 1\nlr: 0.1\nseed: 2\n", "'seed' is given twice, in lines 1 and 3"), ("lr: [0.1\n", "in line 2")]


@pytest.mark.parametrize(("text", "expected"), BAD_FILES)
def test_a_recipe_that_the_notebook_reads_itself_is_checked(kernel, tmp_path, text, expected):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(CellExecutionError, match=expected) as error:
        kernel("train", tmp_path, recipe_file="own.yaml")
    assert "own.yaml" in error.value.evalue


def test_parameters_are_compared_by_name_and_type():
    cells = ["seeds: list = [0]\nlr: float = 0.1\nout: str = None  # a folder", "import os", "%not python", ""]
    assert check_parameters({"In": cells}) == {} == check_parameters({})
    given = {"seeds": [1], "lr": "1e-3", "out": None}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items()) + "\n"
    later = "seeds, out = 3, object()\nanother = 4"  # what a second run of the cells finds is no parameter
    assert check_parameters({"In": [*cells, injected, later], "seeds": 3}) == given
    for wrong in ("seed = [0]", "seeds = (0,)", "lr = True", "out = 3"):
        with pytest.raises(UserError, match=f"parameters: .*{wrong.split()[0]}"):
            check_parameters({"In": [*cells, f"# Parameters\n{wrong}\n"]})
