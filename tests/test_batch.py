"""The batch from end to end on tiny runs: right numbers, nothing done twice, changes, failures and kills survived."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from sptseg.recipe import load_recipe
from sptseg.training.loop import train
from sync import ROOT, copy_project

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("snakemake") is None, reason="Snakemake 9 needs Python 3.11 (extra batch)"),
]
TINY = {
    **{"dataset": "glyphs-20", "image_size": 32, "num_prompts": 2, "train_images": 4, "val_images": 2},
    **{"iterations": 3, "batch_size": 2, "lr": 1e-3, "warmup_iterations": 0, "eval_every": 2, "checkpoint_every": 1},
}
RECIPES = {
    "zegclip": {**TINY, "method": "zegclip"},
    "spt-seg": {**TINY, "method": "spt-seg", "iterations": 40, "checkpoint_every": 2, "eval_every": 40},
    "impossible": {**TINY, "decoder_layers": 0},
}
ROWS = [{"name": name, "recipe": f"table1/tiny/{name}"} for name in RECIPES]
ABOUT = {"columns": ["pAcc", "mIoU(S)", "mIoU(U)", "hIoU"], "benches": ["tiny"]}
TABLES = {
    "benches": {"tiny": {"title": "Tiny", "published": "pascal_voc_2012"}},
    "tables": {
        "table1": {"title": "Table 1", **ABOUT, "sections": [{"rows": ROWS[:2]}]},
        "table2": {"title": "Table 2", **ABOUT, "seeds": {"tiny": 1}, "sections": [{"rows": ROWS[1:]}]},
    },
}
BIN = Path(sys.executable).parent


def recipe_file(checkout, name):
    return checkout / f"nbs/experiments/table1/tiny/{name}.yaml"


def make_checkout(folder):
    """A copy of the project with two tiny tables; one row stands in both, one row of the second is impossible."""
    checkout = copy_project(folder)
    shutil.rmtree(checkout / "data/results", ignore_errors=True)
    recipe_file(checkout, "").parent.mkdir(parents=True)
    for name, recipe in RECIPES.items():
        recipe_file(checkout, name).write_text(yaml.safe_dump(recipe))
    (checkout / "data/tables.yaml").write_text(yaml.safe_dump(TABLES))
    for name, folder in [("assets", "data"), ("experiments", "nbs/experiments")]:  # as the installed package has them
        (checkout / "sptseg" / name).symlink_to(Path("..") / folder)
    return checkout


def make(checkout, target, **variables):
    """Start make as a user does, with this Python and without installing anything; returns the process."""
    given = {"BENCH": "tiny", "SEEDS": 2, "JOBS": 2, "STAMP": "README.md", "ENV": sys.prefix, "BIN": BIN}
    words = [f"{key}={value}" for key, value in {**given, **variables}.items()]
    dropped = ("MAKEFLAGS", "MAKELEVEL", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PYTHONPATH"] = str(checkout)
    return subprocess.Popen(
        ["make", target, *words],
        **{"cwd": checkout, "env": environment, "text": True, "start_new_session": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    print(output)
    return output


def to_run(checkout, target, **variables):
    """What a dry run lists, without the rule that was asked for."""
    output = finish(make(checkout, "dry", TARGET=target, **variables))
    jobs = re.findall(r"^Job \d+: (.*)$", output, re.M)
    assert bool(jobs) != ("Nothing to be done" in output), output
    return sorted(jobs)


def records(checkout):
    """Content and time of every record."""
    results = checkout / "data/results/table1/tiny"
    return {
        path.relative_to(results).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in results.rglob("*.json")
    }


def unfinished(checkout):
    """Names of runs that have a checkpoint and no record."""
    runs = checkout / "data/runs/table1/tiny"
    started = {path.parent.relative_to(runs).as_posix() for path in runs.rglob("checkpoint-*.pt")}
    return started - {name.removesuffix(".json") for name in records(checkout)}


KILLED_WHEN = [  # by records that are there, and runs that have a checkpoint and no record
    lambda finished, started: started and not finished,
    lambda finished, started: started and finished,
    lambda finished, started: len(finished) == 4,  # every run that can succeed: tables are being written
]


def is_alive(process):
    """Whether a process still runs; a dead one may still be listed until someone waits for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_when(checkout, moment):
    """Start `make tables` and kill it with all it started; returns the records then, and what it had printed."""
    process, deadline = make(checkout, "tables"), time.time() + 240
    while not moment(records(checkout), unfinished(checkout)):
        assert time.time() < deadline and process.poll() is None, finish(process)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGSTOP)  # nothing starts while its children are listed
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(is_alive, started)):  # kernels are groups of their own, and end when they find their parent dead
        assert time.time() < deadline, started
        time.sleep(0.02)
    os.set_blocking(process.stdout.fileno(), False)
    return records(checkout), os.read(process.stdout.fileno(), 2**20).decode()


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """A checkout where `make tables` was killed three times, then not: records, outputs of each call, last status."""
    checkout = make_checkout(tmp_path_factory.mktemp("batch") / "checkout")
    kept, outputs = zip(*(kill_when(checkout, moment) for moment in KILLED_WHEN), strict=True)
    last = make(checkout, "tables")
    outputs = [*outputs, finish(last)]
    return checkout, [*kept, records(checkout)], outputs, last.returncode


def test_a_killed_batch_goes_on_where_it_was(batch):
    _, kept, outputs, _ = batch
    assert kept[3].keys() == {f"{name}/seed{seed}.json" for name in ("zegclip", "spt-seg") for seed in (0, 1)}
    assert 0 < len(kept[1]) < len(kept[2]) == 4
    for before, after, output in zip(kept, kept[1:], outputs[1:], strict=False):
        assert before.items() <= after.items(), "content and time of finished records are kept"
        assert f"runs to make: {6 - len(before)}," in output
    assert "(continues)" in outputs[1] and "(continues)" in outputs[2]
    assert re.search(r"\d of \d runs are made, about \d+ \w+ left", outputs[2])


def test_records_hold_the_numbers_of_uninterrupted_direct_runs(batch, tmp_path):
    checkout = batch[0]
    for name, (content, _) in records(checkout).items():
        record, seed = json.loads(content), int(name[-6])
        keys = {"metrics", "recipe", "history", "seconds", "device", "trained_values", "commit", "versions"}
        assert keys <= record.keys() and record["recipe"]["seed"] == seed
        assert record["metrics"].keys() >= {"pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "IoU"}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        direct = train(
            load_recipe(recipe_file(checkout, Path(name).parent), seed=seed), tmp_path / name, progress=False
        )
        torch.set_num_threads(threads)
        assert record["metrics"] == direct["metrics"]


def test_a_failing_row_stops_only_its_own_table(batch):
    checkout, _, (*_, output), status = batch
    errors = dict(re.findall(r"FAILED   table1/tiny/impossible, seed (\d): (.*)", output))
    assert status != 0 and errors.keys() == {"0", "1"}
    assert all("UserError" in error and "decoder_layers" in error for error in errors.values())
    executed = checkout / "data/runs/table1/tiny/impossible/seed0.ipynb"
    assert "UserError" in executed.read_text() and str(executed.relative_to(checkout)) in output
    tables = sorted((checkout / "figures").glob("tiny-*"))
    assert [path.name for path in tables] == ["tiny-table1.csv", "tiny-table1.md", "tiny-table1.tex"]
    assert "seeds 0, 1" in tables[1].read_text() and "not measured" not in tables[1].read_text()


def test_nothing_runs_again_but_what_changed_whatever_the_times_of_files(batch, tmp_path):
    checkout, clone = batch[0], tmp_path / "clone"
    git = ["git", "-C", checkout, "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "results"], ["clone", "-q", checkout, clone]):
        subprocess.run([*git, *command], check=True)
    files = [path for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    random.Random(0).shuffle(files)
    for age, path in enumerate(files):
        os.utime(path, (1.7e9 + age, 1.7e9 + age))
    assert not (clone / "data/runs").exists() and not (clone / ".snakemake").exists()
    assert to_run(clone, "table1") == []

    recipe = recipe_file(clone, "zegclip")
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.002"))
    os.utime(recipe, (1e9, 1e9))
    assert to_run(clone, "tables") == [
        *(f"run table1/tiny/{name}, seed {seed}" for name in ("impossible", "zegclip") for seed in (0, 1)),
        *(f"write figures/tiny-{table}.md, .csv, .tex" for table in ("table1", "table2")),
    ]


def test_without_seeds_every_table_has_its_own_number_of_runs(batch):
    assert to_run(batch[0], "tables", SEEDS="") == [
        "run table1/tiny/impossible, seed 0",
        *(f"run table1/tiny/{name}, seed 2" for name in ("spt-seg", "zegclip")),
        *(f"write figures/tiny-{table}.md, .csv, .tex" for table in ("table1", "table2")),
    ]


def test_a_mistake_is_shown():
    process = make(ROOT, "table1", BENCH="nonsense")
    assert "nonsense: unknown name" in finish(process) and process.returncode != 0
