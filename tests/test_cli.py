"""What bad input gets: one line that names the culprit and the remedy, exit status 1, and nothing overwritten."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from open_clip.transformer import VisionTransformer
from torch.utils.data import Dataset

import sptseg
from sptseg.cli import main, make_parser, parse_arguments
from sptseg.core import BarLines
from sptseg.data.benchmarks import BENCHMARKS, Benchmark
from sptseg.data.label_sets import LabelSet, load_label_set
from sptseg.data.transforms import Sample
from sptseg.models.segmenter import METHODS, build_segmenter, save_segmenter
from sptseg.recipe import Recipe, load_recipe

TINY = {
    **{
        "dataset": "glyphs-20",
        "clip": "glyph-clip",
        "image_size": 32,
        "num_prompts": 2,
        "decoder_layers": 1,
        "train_images": 4,
    },
    **{"val_images": 1, "iterations": 2, "batch_size": 2, "warmup_iterations": 0, "checkpoint_every": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "row.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["train", str(folder / "row.yaml"), "--quiet", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def row(tmp_path, monkeypatch):
    """A recipe in an otherwise empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "row.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, *arguments):
    """The one line that a command shows for bad input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith("sptseg: ") and "Traceback" not in line and not shown.out
    return line.removeprefix("sptseg: ")


BAD_SETTINGS = {  # what is wrong: (settings, what the line must say)
    "unknown key": (["learning_rate=1"], ["learning_rate=1: ", "unknown key 'learning_rate'"]),
    "misspelt key": (["iteration=1"], ["'iteration'", "did you mean 'iterations'?"]),
    "an old key of training images": (["train_pictures=4"], ["'train_pictures'", "it is now 'train_images'"]),
    "an old key of test images": (["val_pictures=4"], ["'val_pictures'", "it is now 'val_images'"]),
    "the old key of micro-batches": (["micro_batches=2"], ["'micro_batches'", "'gradient_accumulation_steps'"]),
    "a key that is a word of the program": (["name=x"], ["'name'"]),
    "wrong type": (["batch_size=many"], ["batch_size=many: ", "'many'"]),
    "a truth value for a number": (["workers=yes"], ["workers=True: ", "quote text"]),
    "a truth value for a word": (["setting=off"], ["setting=False: ", "quote text"]),
    "a truth value in a list": (["ratio_range=[no, 2]"], ["ratio_range=[False, 2]: ", "quote text"]),
    "a number for text": (["data_root=2012"], ["data_root=2012: ", "write it in quotes"]),
    "no value": (["lr="], ["lr=: no value is given", "leave the key out"]),
    "no word for no loss": (["auxiliary_loss=null"], ["auxiliary_loss=: ", "write none for no auxiliary loss"]),
    "no word for no prompts": (["spectral_blocks="], ["spectral_blocks=: ", "write none for no spectral prompts"]),
    "a truth value for prompts": (["spectral_blocks=no"], ["spectral_blocks=False: ", "write none for no prompts"]),
    "a setting given twice": (["seed=1", "lr=0.1", "seed=2"], ["seed=2: ", "seed is given twice"]),
    "a key twice in a value": (["ratio_range={a: 1, a: 2}"], ["'a' is given twice, in lines 1 and 1"]),
    "wrong type in a list": (["ratio_range=[1, wide]"], ["ratio_range=[1, 'wide']: ", "found 'wide' at [1]"]),
    "out of range": (["dropout=1.5"], ["dropout", "1.5"]),
    "no iterations": (["iterations=0"], ["iterations", "0"]),
    "unknown method": (["method=unet"], ["method", "'spt-seg'", "'unet'"]),
    "unknown setting": (["setting=zero-shot"], ["setting", "'inductive'"]),
    "unknown dataset": (["dataset=nowhere"], ["dataset", "'nowhere'", "glyphs-20"]),
    "layers in reverse": (["spectral_blocks=2-1"], ["spectral_blocks", "'2-1'", "'1-2'"]),
    "layers that do not exist": (["spectral_blocks=1-99"], ["spectral_blocks", "'1-99'"]),
    "one layer that does not exist": (["spectral_blocks=99"], ["spectral_blocks", "'99'"]),
    "size that is no multiple": (["image_size=30"], ["image_size", "30", "multiple"]),
    "ratios in reverse": (["ratio_range=[2, 1]"], ["ratio"]),
    "unknown clip": (["clip=no-such-clip"], ["no-such-clip"]),
    "missing weights": (["clip=ViT-B-16-quickgelu", "clip_weights=gone.pt"], ["gone.pt"]),
    "no weights named": (["clip=ViT-B-16-quickgelu"], ["ViT-B-16-quickgelu", "weights"]),
    "folder without weights": (["clip=empty"], ["empty"]),
    "no setting": (["seed"], ["'seed'", "key=value"]),
    "value that is no YAML": (["lr=[1"], ["lr=[1"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(row, capsys, case):
    settings, expected = BAD_SETTINGS[case]
    (row.parent / "empty").mkdir()
    before = snapshot(row.parent)
    line = refusal(capsys, "train", row, "--quiet", "--out", "run", *settings)
    assert all(part in line for part in expected), line
    assert {path: file for path, file in snapshot(row.parent).items() if "run" not in path.parts} == before
    assert not list(row.parent.rglob("*.pt")) and not list(row.parent.rglob("*.safetensors"))


BAD_RECIPES = {
    "missing": (None, "this recipe does not exist"),
    "not YAML": ("a: [1", "not valid YAML"),
    "no mapping": ("- 1\n- 2", "key: value"),
    "empty": ("", "key: value"),
    "binary": (b"\xff\xfe\x00\x81", "not valid YAML"),
    "no dataset": ("seed: 1", "dataset"),
    "a number as key": ("dataset: glyphs-20\n1: 2", "1"),
    "a key twice": ("dataset: glyphs-20\nlr: 0.1\nseed: 1\nlr: 0.2", "'lr' is given twice, in lines 2 and 4"),
    "an empty value": ("dataset: glyphs-20\nauxiliary_loss:\n", "auxiliary_loss: no value is given; write none"),
    "a date that does not exist": ("dataset: 2026-02-30", "not valid YAML"),
    "YAML broken in line 3": ("dataset: glyphs-20\nseed: 1\nratio_range: [1, 2", "in line 3"),
    "parameters of a notebook": ("recipes: [demo/spt-seg]\nseeds: [0]", "no key of a recipe"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_are_refused(row, capsys, case):
    content, expected = BAD_RECIPES[case]
    row.unlink()
    if content is not None:
        row.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(row.parent)
    line = refusal(capsys, "train", row, "--out", "run")
    assert str(row) in line and expected in line and snapshot(row.parent) == before


def test_near_names_are_offered_and_no_list(row, capsys):
    assert refusal(capsys, "train", "demo/sptseg") == "demo/sptseg: no such recipe; did you mean 'demo/spt-seg'?"
    assert refusal(capsys, "train", row.with_name("rows.yaml")).endswith(f"did you mean {str(row)!r}?")
    far = refusal(capsys, "train", "unlike-anything")
    assert "`sptseg recipes`" in far and len(far) < 120
    offered = refusal(capsys, "train", "complexity/spt-seg-vo")
    assert "'complexity" not in offered, "a model with random weights is not for training"


def test_the_origin_of_a_bad_value_is_named(row, capsys):
    row.write_text(row.read_text() + "dropout: much\n")
    assert refusal(capsys, "train", row, "seed=1").startswith(f"{row}: dropout: ")
    assert refusal(capsys, "train", row, "dropout=2").startswith("dropout=2: ")


def test_mixed_precision_no_is_text(row):
    assert load_recipe(row, mixed_precision=False).mixed_precision == "no"


def test_only_drawn_scenes_default_to_the_built_in_clip():
    for dataset in ("folder", "voc", "coco-stuff", "context-59"):
        assert (Recipe(dataset=dataset).clip, Recipe(dataset=dataset).clip_weights) == ("ViT-B-16-quickgelu", "openai")
    assert Recipe(dataset="glyphs-20").clip == "glyph-clip" and Recipe(dataset="folder", clip="x").clip_weights is None


def test_the_starter_for_own_data_is_small_and_asks_for_the_folder(row, capsys):
    starter, paper = load_recipe("own-data/starter"), Recipe(dataset="folder")
    assert (starter.dataset, starter.clip, starter.clip_weights) == ("folder", paper.clip, paper.clip_weights)
    work = [each.image_size**2 * each.batch_size * each.iterations for each in (starter, paper)]
    assert work[0] < work[1] / 400 and starter.warmup_iterations < starter.iterations
    assert "set data_root=DIR" in refusal(capsys, "train", "own-data/starter")


def test_a_shipped_recipe_is_found_even_beside_a_folder_of_its_name(row, capsys):
    (row.parent / "demo/smoke").mkdir(parents=True)
    assert "'kolour'" in refusal(capsys, "train", "demo/smoke", "kolour=1")
    assert "demo/smoke" in refusal(capsys, "train", "demo/none")


def test_an_output_that_is_a_file_is_left_alone(row, capsys):
    before = snapshot(row.parent)
    assert "row.yaml" in refusal(capsys, "train", row, "--out", row)
    assert "row.yaml" in refusal(capsys, "train", row, "--out", row / "run")
    assert snapshot(row.parent) == before


BAD_PLACES = {  # what is wrong: (arguments, what the line must say)
    "a folder for a figure": (["data", "report", "glyphs-20", "--out", "empty"], "empty: is a folder"),
    "a figure of an unknown format": (["data", "report", "glyphs-20", "--out", "a.xyz"], "a.xyz: a figure cannot"),
    "a folder for drawn images": (
        ["data", "report", "glyphs-20", "--root", "empty"],
        "empty: dataset 'glyphs-20' is drawn",
    ),
    "a folder for metrics": (["evaluate", "run", "--out", "empty"], "empty: is a folder"),
    "a file for details": (["evaluate", "run", "--details", "row.yaml"], "row.yaml: is a file"),
    "a file for a dataset": (["data", "voc", "--root", "row.yaml", "--download"], "row.yaml: is a file"),
    "a file for masks": (["data", "convert", "config.yaml", "--root", "row.yaml"], "row.yaml: is a file"),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_the_places_of_results_are_checked_before_the_work(row, capsys, case):
    arguments, expected = BAD_PLACES[case]
    (row.parent / "empty").mkdir()
    before = snapshot(row.parent)
    assert refusal(capsys, *arguments).startswith(expected) and snapshot(row.parent) == before


def test_a_negative_number_of_processes_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["data", "report", "glyphs-20", "--workers", "-1"])
    assert "'-1' is not a number of processes; use 0 or more" in capsys.readouterr().err


BAD_LABEL_SETS = {
    "both": ({"classes": ["cat", "dog"], "seen": ["cat", "dog"], "unseen": ["dog"]}, ["'dog'", "both"]),
    "empty": ({"classes": []}, ["classes", "empty"]),
    "no classes": ({"name": "nothing"}, ["classes", "empty"]),
    "unknown name": ({"classes": ["cat"], "unseen": ["cow"]}, ["unseen", "'cow'"]),
    "twice": ({"classes": ["cat", "cat"]}, ["classes", "'cat'", "list it once"]),
    "all unseen": ({"classes": ["cat"], "unseen": ["cat"]}, ["unseen", "at least one"]),
    "wrong type": ({"classes": ["cat", True]}, ["classes", "True"]),
    "unknown key": ({"classes": ["cat"], "colours": []}, ["colours"]),
}


@pytest.mark.parametrize("case", BAD_LABEL_SETS)
def test_bad_label_sets_are_refused(row, capsys, monkeypatch, case):
    content, expected = BAD_LABEL_SETS[case]
    file = row.parent / "labels.yaml"
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setitem(BENCHMARKS, "own", lambda name, **options: Benchmark(load_label_set(file), None, None))
    line = refusal(capsys, "train", row, "dataset=own", "--out", "run")
    assert str(file) in line and all(part in line for part in expected)


class Samples(Dataset):
    """The same sample again and again."""

    def __init__(self, image, mask):
        self.sample = Sample(image, mask, "image 7")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.sample


IMAGE, MASK = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(40, 50, dtype=torch.uint8)
BAD_SAMPLES = {
    "an image that is none": ((torch.zeros(40), MASK), "the image is"),
    "a grey image": ((IMAGE[:1], MASK), "the image is"),
    "an image of floats": ((IMAGE.float(), MASK), "the image is"),
    "a mask of another size": ((IMAGE, MASK[:-1]), "the mask has shape"),
    "a mask of floats": ((IMAGE, MASK.float()), "the mask has type"),
    "a label outside the class list": ((IMAGE, MASK + 2), "label 2 is outside"),
}


def refusal_of_samples(row, capsys, monkeypatch, train, val, *settings):
    benchmark = Benchmark(LabelSet("two", ("red cat", "red star"), unseen=(1,)), train, val)
    monkeypatch.setitem(BENCHMARKS, "own", lambda name, **options: benchmark)
    line = refusal(capsys, "train", row, "dataset=own", "--quiet", "--out", "run", *settings)
    assert "image 7: " in line and not (row.parent / "run/results.json").exists()
    return line


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_images_and_masks_are_refused(row, capsys, monkeypatch, case):
    sample, expected = BAD_SAMPLES[case]
    for train, val in ((Samples(*sample), Samples(IMAGE, MASK)), (Samples(IMAGE, MASK), Samples(*sample))):
        assert expected in refusal_of_samples(row, capsys, monkeypatch, train, val)


def test_a_failed_run_leaves_no_thread_behind(row, capsys, monkeypatch):
    before, images = threading.active_count(), Samples(IMAGE, MASK + 2)
    refusal_of_samples(row, capsys, monkeypatch, images, images)
    assert threading.active_count() <= before


def test_a_bad_image_in_another_process_is_one_line_too(row, capsys, monkeypatch):
    images = Samples(IMAGE, MASK + 2)
    assert "label 2 is outside" in refusal_of_samples(row, capsys, monkeypatch, images, images, "workers=1")


def test_resuming_with_a_changed_recipe_is_refused(finished, capsys):
    before = snapshot(finished)
    row = finished.parent / "row.yaml"
    line = refusal(capsys, "train", row, "--quiet", "--out", finished, "lr=0.5", "seed=2")
    assert str(finished) in line and "lr 0.0002 → 0.5" in line and "seed 0 → 2" in line
    assert snapshot(finished) == before


def make_run(folder, finished, weights=None):
    """A folder that looks like a finished run, with other weights or none."""
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_weights_of_another_method_are_refused(finished, capsys):
    before = snapshot(finished)
    line = refusal(capsys, "evaluate", finished, "--quiet", "method=zegclip")
    assert "model.safetensors" in line and "decoder='sgd' (wanted 'zegclip')" in line
    assert snapshot(finished) == before


def test_weights_of_another_width_are_refused(finished, tmp_path, capsys):
    run = make_run(tmp_path / "run", finished)
    wider = VisionTransformer(32, 8, 48, 4, 2, 2.0, output_dim=24)
    config = METHODS["spt-seg"].model_copy(update={"image_size": 32, "num_prompts": 2, "decoder_layers": 1})
    save_segmenter(run / "model.safetensors", build_segmenter(wider, config), clip="glyph-clip")
    before = snapshot(run)
    line = refusal(capsys, "evaluate", run, "--quiet")
    assert "model.safetensors" in line and "do not fit the model" in line and snapshot(run) == before


@pytest.mark.parametrize("weights", [None, b"", b"no weights at all"])
def test_missing_or_broken_weights_are_refused(finished, tmp_path, capsys, weights):
    run = make_run(tmp_path / "run", finished, weights)
    before = snapshot(run)
    assert str(run / "model.safetensors") in refusal(capsys, "evaluate", run, "--quiet")
    assert snapshot(run) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    refused = refusal(capsys, "evaluate", tmp_path)
    assert refused.count(str(tmp_path)) == 1 and "not the folder of a run" in refused and "did you mean" not in refused
    assert f"{tmp_path / 'gone'}: this run does not exist" in refusal(capsys, "evaluate", tmp_path / "gone")


def test_the_nearest_run_is_offered(finished, capsys):
    assert f"did you mean {str(finished)!r}?" in refusal(capsys, "evaluate", f"{finished}s")
    assert refusal(capsys, "evaluate", finished, "lr=fast", "--quiet").startswith("lr=fast: ")


def test_evaluation_repeats_the_runs_own(finished, tmp_path, capsys):
    out = tmp_path / "again.json"
    assert main(["evaluate", str(finished), "--quiet", "--out", str(out)]) == 0
    again, first = (json.loads(path.read_text()) for path in (out, finished / "results.json"))
    assert again["metrics"] == first["metrics"] and str(out) in capsys.readouterr().out


def test_the_best_weights_can_be_evaluated(finished, tmp_path, capsys):
    out, results = tmp_path / "best.json", json.loads((finished / "results.json").read_text())
    assert main(["evaluate", str(finished), "--best", "--out", str(out), "--quiet"]) == 0
    found = json.loads(out.read_text())
    assert found["weights"] == str(finished / "best.safetensors")
    assert found["metrics"]["pAcc"] == results["best"]["pAcc"]


def test_settings_may_stand_anywhere(capsys):
    for order in (
        ["a.yaml", "--out", "x", "seed=1"],
        ["a.yaml", "seed=1", "--out", "x"],
        ["--out", "x", "a.yaml", "seed=1"],
    ):
        chosen = parse_arguments(["train", *order])
        assert (chosen.recipe, chosen.settings, str(chosen.out)) == ("a.yaml", ["seed=1"], "x")
    both = parse_arguments(["train", "a.yaml", "seed=1", "--quiet", "lr=2"])
    assert both.settings == ["seed=1", "lr=2"] and both.quiet


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["train"], ["train", "x", "--colour", "red"], ["check-reference", "x", "seed=1"], ["evaluate"]],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: sptseg" in capsys.readouterr().err


def commands(parser=None, prefix=()):
    """Every command with its parser: ("train",), ("data", "voc"), …"""
    for action in (parser or make_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*prefix, name), child
                yield from commands(child, (*prefix, name))


COMMANDS = dict(commands())


def shown_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert {("train",), ("evaluate",), ("convert",), ("data", "voc"), ("data", "report")} <= COMMANDS.keys()
    for command in COMMANDS:
        assert f"    {command[-1]}" in shown_help(command[:-1], capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_every_argument(command, capsys):
    shown = " ".join(shown_help(command, capsys).split())
    for action in COMMANDS[command]._actions:
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        explained = (action.help or "") % {"default": action.default}
        assert name in shown and " ".join(explained.split()) in shown
        assert explained or isinstance(action, argparse._SubParsersAction), f"{name}: no help"


def test_a_process_shows_one_line_and_no_traceback(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "COLUMNS": "80"}
    command = [sys.executable, "-m", "sptseg.cli", "train", "demo/smoke", "spectral_blocks=2-1", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("sptseg: spectral_blocks: '2-1'") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["recipes"], ["--print-completion", "bash"]])
def test_a_closed_pipe_ends_quietly(arguments, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "sptseg.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment)
    process.stdout.close()  # before anything is written
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["train"], "required: recipe\n"), (["train", "seed=1"], "seed=1 is a setting"), (["evaluate"], "run_folder\n")],
)
def test_usage_names_the_missing_argument(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: sptseg {arguments[0]} ") and said in shown


def test_version_and_recipes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"sptseg {sptseg.__version__}\n"
    assert main(["recipes"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "two cores" in lines["demo/spt-seg"] and "table1/voc/spt-seg" in lines and "demo/demo" not in lines


@pytest.mark.parametrize("command", sorted(COMMANDS), ids=" ".join)
def test_help_has_a_description_and_examples(command, capsys):
    parser = COMMANDS[command]
    assert parser.description and "  sptseg " in (parser.epilog or "")
    for line in parser.epilog.splitlines()[1:]:
        parse_arguments(shlex.split(line)[1:])


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(command[-1] in script for command in COMMANDS)


def test_bars_write_lines_where_stderr_is_no_terminal(row, capsys):
    assert main(["train", str(row), "--out", "run"]) == 0
    shown = capsys.readouterr().err
    assert "\r" not in shown and "2/2" in shown and not isinstance(sys.stderr, BarLines)


def test_a_warning_is_one_line(tmp_path, capsys):
    program = "import sys; from sptseg.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = ["iterations=4", "warmup_iterations=400", "tracker=none"]
    command = [sys.executable, "-c", program, "train", "demo/smoke", "--quiet", *settings, "--out", str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    [line] = [line for line in lines if "warmup_iterations" in line]
    assert line.startswith("sptseg: warning: warmup_iterations 400: ")
    assert not any("warnings.warn(" in line for line in lines)
