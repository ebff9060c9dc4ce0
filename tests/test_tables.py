"""Tables: rows and recipes that fit together, records that count only for their recipe, files that stay the same."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sptseg.core import UserError, save_json
from sptseg.evaluation.metrics import HEADLINE
from sptseg.paper import formats, tables
from sptseg.paper.curves import SCORES, belongs_to
from sptseg.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
ABOUT = yaml.safe_load((ROOT / "data/tables.yaml").read_text())["tables"]
PUBLISHED = json.loads((ROOT / "data/published.json").read_text())
PAPER = ROOT.parent / "shared/paper_tables.json"
PAIRS = [
    (bench, table)
    for bench in ("glyphs-20", "glyphs-stuff", "voc", "coco")
    for table in tables.table_names(bench, ROOT)
]


@pytest.fixture
def root(tmp_path):
    """A checkout with rows and published numbers and nothing else."""
    (tmp_path / "data").mkdir()
    for name in ("tables.yaml", "published.json"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data" / name)
    return tmp_path


def add_record(root, recipe, run, value, **changes):
    """A made-up record of seed `run`; `changes` are keys in which its recipe differs."""
    content = tables.recipe_of_row(recipe, root, seed=run).model_dump(mode="json") | changes
    metrics = dict.fromkeys(HEADLINE, value)
    return save_json(
        root / tables.record_path(recipe, run), {"metrics": metrics, "recipe": content, "commit": "1f3c2ab"}
    )


@pytest.mark.parametrize(("bench", "table"), [pair for pair in PAIRS if pair[0] != "coco"])
def test_rows_of_a_table_differ_only_in_what_it_is_about(bench, table):
    base = load_recipe(f"table1/{bench}/spt-seg").model_dump()
    for name in tables.recipes_of([table], bench, ROOT):
        row = load_recipe(name).model_dump()
        assert {key for key in row if row[key] != base[key]} <= set(ABOUT[table]["about"]), name


@pytest.mark.parametrize("bench", ["glyphs-20", "glyphs-stuff", "voc", "coco"])
def test_no_two_recipes_of_a_benchmark_train_the_same(bench):
    names = tables.recipes_of(tables.table_names(bench, ROOT), bench, ROOT)
    contents = [load_recipe(name).model_dump_json() for name in names]
    assert len(set(contents)) == len(names) == len(set(names))
    folder = ROOT / "nbs/experiments"
    files = [path for table in ABOUT for path in folder.glob(f"{table}/{bench}/*.yaml")]
    assert {path.relative_to(folder).with_suffix("").as_posix() for path in files} == set(names), "every file is a row"


@pytest.mark.parametrize(("bench", "table"), [pair for pair in PAIRS if pair[1].startswith("table")])
def test_every_row_of_the_paper_is_there(bench, table):
    dataset = "coco_stuff_164k" if bench in ("coco", "glyphs-stuff") else "pascal_voc_2012"
    shown = {row.published for row in tables.rows_of(table, bench, ROOT)}
    assert {f"{table}/{dataset}/{name}" for name in PUBLISHED[table].get(dataset, {})} <= shown
    if table == "table1":
        assert {f"later/{dataset}/{name}" for name in PUBLISHED["later"][dataset]} <= shown


def test_transductive_rows_show_the_published_numbers():
    rows = [row for row in tables.rows_of("table1", "coco", ROOT) if row.recipe == "table1/coco/zegclip-transductive"]
    assert tables.published_numbers(rows[0].published, ROOT)["hIoU"] == 48.5


@pytest.mark.skipif(not PAPER.exists(), reason="the numbers that were read from the papers are not here")
def test_published_numbers_are_those_of_the_papers():
    paper = json.loads(PAPER.read_text())
    assert paper["table1"].items() <= PUBLISHED["table1"].items()
    for table in ("table2", "table3", "table4"):
        assert PUBLISHED[table]["pascal_voc_2012"] == paper[table]["rows"]
    for dataset in ("pascal_voc_2012", "coco_stuff_164k"):
        assert list(PUBLISHED["later"][dataset].values()) == list(paper["later"][dataset].values())


def test_a_record_counts_only_for_its_recipe(root):
    name = "table4/glyphs-20/one-layer"
    assert not tables.is_current(name, 0, root)
    path = add_record(root, name, 0, 50.0)
    assert tables.is_current(name, 0, root) and not tables.is_current(name, 1, root)
    add_record(root, name, 0, 50.0, workers=3, data_root="elsewhere")
    assert tables.is_current(name, 0, root), "keys without effect on a result"
    for change in ({"seed": 1}, {"decoder_layers": 2}, {"iterations": 7}, {"unknown": 1}):
        add_record(root, name, 0, 50.0, **change)
        assert not tables.is_current(name, 0, root), change
    add_record(root, name, 0, 50.0)
    path.write_text(path.read_text()[:-20])
    assert not tables.is_current(name, 0, root), "half a file"


def test_a_changed_recipe_outdates_its_record(root):
    name = "table4/glyphs-20/one-layer"
    own = root / "nbs/experiments" / f"{name}.yaml"
    own.parent.mkdir(parents=True)
    shutil.copy(ROOT / "nbs/experiments" / f"{name}.yaml", own)
    add_record(root, name, 0, 50.0)
    assert tables.is_current(name, 0, root)
    own.write_text(own.read_text() + "# only a comment\n")
    assert tables.is_current(name, 0, root)
    own.write_text(own.read_text() + "num_prompts: 3\n")
    assert not tables.is_current(name, 0, root)
    own.write_text("dataset: [\n")
    assert not tables.is_current(name, 0, root), "a mistake in a recipe is its run's to report"


def test_mean_spread_and_what_was_not_measured(root):
    for seed, value in enumerate((40.0, 42.0, 44.0)):
        add_record(root, "table1/glyphs-20/zegclip", seed, value)
    add_record(root, "table2/glyphs-20/spt", 1, 42.04)
    add_record(root, "table2/glyphs-20/sgd", 0, None)
    add_record(root, "table1/glyphs-20/spt-seg", 0, 99.0, iterations=1)
    frame = formats.table_frame("table2", "glyphs-20", range(3), root, mark="<{}>")
    assert frame["hIoU, %"].tolist() == ["<42.0\u00a0±\u00a02.0>", "<42.0>", "n/a", "not measured"]
    assert frame["runs"].tolist() == ["3", "1", "1", "0"]
    assert frame["published hIoU, %"].tolist() == ["84.3", "89.6", "85.5", "90.1"]
    numbers = tables.table_numbers("table2", "glyphs-20", range(3), root)
    assert numbers["hIoU std"][0] == 2.0 and math.isnan(numbers["hIoU std"][1])


def test_the_best_is_sought_in_each_section(root):
    for name, value in {"zegclip": 50.0, "spt-seg": 60.0, "zegclip-supervised": 70.0}.items():
        add_record(root, f"table1/glyphs-20/{name}", 0, value)
    frame = formats.table_frame("table1", "glyphs-20", [0], root, mark="<{}>").set_index("row")["hIoU, %"]
    assert frame["SPT-SEG"].tolist() == ["<60.0>", "not measured"] and frame["ZegCLIP"].tolist()[0] == "50.0"
    assert frame["ZegCLIP*"] == "70.0", "nothing to choose from"
    assert frame["SPNet"] == "–" and frame["CLIP (nothing is trained)"] == "not measured"


@pytest.mark.parametrize(("bench", "table"), PAIRS)
def test_files_say_where_they_come_from_and_stay_the_same(bench, table, root):
    for recipe in tables.recipes_of([table], bench, root)[:2]:
        for seed in (0, 1):
            add_record(root, recipe, seed, 50 + seed / 3)
    paths = formats.write_table(table, bench, [0, 1], root / "figures", root)
    assert [path.name for path in paths] == [f"{bench}-{table}.{ending}" for ending in ("md", "csv", "tex")]
    trained = bool(tables.recipes_of([table], bench, root))
    facts = [f"make {table} BENCH={bench}", *(["seeds 0, 1", "1f3c2ab", "SEEDS=2"] if trained else [])]
    for path in paths:
        assert all(fact in path.read_text() for fact in facts), path.name
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in formats.write_table(table, bench, [0, 1], root / "figures", root)] == before

    markdown, csv, latex = (path.read_text() for path in paths)
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert len(pd.read_csv(paths[1], comment="#")) == len(tables.rows_of(table, bench, root))
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")].replace(r"\&", "")
    rows = [line for line in body.splitlines() if not line.startswith((r"\midrule", r"\multicolumn"))]
    columns = len(latex.split(r"\begin{tabular}{", 1)[1].split("}")[0])
    assert {line.count("&") for line in rows} == {columns - 1} and all(line.endswith(r"\\") for line in rows)
    assert latex.replace(r"\{", "").count("{") == latex.replace(r"\}", "").count("}")
    assert latex.isascii(), "no package for other letters"


def test_other_seeds_are_named_in_the_command(root):
    for seeds, named in {(0,): "SEEDS=1`", (0, 2): "SEEDS=0,2`", (4,): "SEEDS=4,`"}.items():
        assert named in formats.origin_lines("table2", "voc", seeds, root)[0]


@pytest.mark.parametrize(("table", "bench"), [("table9", "voc"), ("table1", "ade20k"), ("table2", "coco")])
def test_unknown_tables_are_refused_in_one_line(table, bench):
    with pytest.raises(UserError, match=f"{table}|{bench}") as refused:
        tables.rows_of(table, bench, ROOT)
    assert "\n" not in str(refused.value)


def test_what_needs_no_training_is_measured_once(root, monkeypatch):
    calls = []

    def scores(recipe):
        calls.append(recipe)
        return {"metrics": dict.fromkeys(HEADLINE, 20.0)}

    monkeypatch.setitem(tables.MEASURES, "clip-scores", scores)
    [written] = tables.measure_missing("table1", "glyphs-20", root)
    assert tables.measure_missing("table1", "glyphs-20", root) == [] and len(calls) == 1
    assert formats.table_frame("table1", "glyphs-20", [0], root).set_index("row")["hIoU, %"][
        "CLIP (nothing is trained)"
    ]
    record = json.loads(written.read_text())
    save_json(written, record | {"recipe": record["recipe"] | {"iterations": 7}})
    assert tables.measure_missing("table1", "glyphs-20", root) == [], "CLIP is not trained"
    save_json(written, record | {"recipe": record["recipe"] | {"image_size": 48}})
    assert tables.measure_missing("table1", "glyphs-20", root) == [written]


def test_efficiency_shows_the_published_counts():
    numbers = tables.table_numbers("efficiency", "voc", [], ROOT).set_index("row")
    record = json.loads((ROOT / "data/results/complexity/zegclip-voc.json").read_text())["operations"]
    detours = (record["published, with the releases' detours"] - record["published"]) / 1e9
    for column, left_out in (("parameters counted, M", 0), ("multiply-adds, G", detours)):
        ours, theirs = numbers[column]["ZegCLIP"], numbers[f"published {column}"]["ZegCLIP"]
        assert abs(ours + left_out - theirs) < 0.06, column
    costs = numbers["multiply-adds, G"]
    assert costs["CLIP"] < costs["ZegCLIP"] < costs["SPT-SEG"]
    shown = formats.table_frame("efficiency", "voc", [], ROOT).set_index("row")
    assert shown["training, images/s"]["CLIP (nothing is trained)"] == "–", "nothing to measure"
    speeds = shown["test, images/s"]
    assert speeds[speeds != "not measured"].astype(float).gt(0).sum() >= 3


@pytest.mark.slow
def test_a_copy_of_the_project_reads_its_own_records(kernel, root):
    add_record(root, "table4/glyphs-20/one-layer", 0, 12.3)
    executed = kernel("tables", root, table="table4", seeds=[0], folder="figures")
    assert "12.3" in (root / "figures/glyphs-20-table4.md").read_text()
    assert "1 of 3 runs are finished" in executed.read_text()


@pytest.mark.parametrize(("setting", "gamma"), [("inductive", 0.1), ("transductive", 0.0), ("supervised", 0.0)])
def test_a_calibration_curve_is_compared_where_its_run_was_tested(setting, gamma):
    """Only inductive runs are tested with calibrated stacking."""
    curve = pd.DataFrame(dict.fromkeys(SCORES, [1.0, 2.0]), index=pd.Index([0.0, 0.1], name="γ"))
    record = {"recipe": {"seen_bias": 0.1, "setting": setting}, "metrics": curve.loc[gamma].to_dict()}
    assert belongs_to(curve, record) and not belongs_to(curve + 1e-3, record)
    assert not belongs_to(curve[::-1].set_axis(curve.index), record)
