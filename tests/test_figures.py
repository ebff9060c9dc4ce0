"""Figures: true to their data, readable at a column's width, and the same bytes each time."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text
from torch.nn import functional as F

from sptseg.core import IGNORE, UserError, save_json
from sptseg.data.benchmarks import Benchmark
from sptseg.data.label_sets import LabelSet
from sptseg.data.transforms import Sample
from sptseg.evaluation.metrics import mean_spread
from sptseg.models.prompts import SpectralPrompt
from sptseg.paper.features import filter_images, plot_filters, plot_selection, power_by_frequency, principal_map
from sptseg.paper.figures import (
    COLUMN,
    PAGE,
    class_order,
    found_records,
    plot_ablations,
    plot_classes,
    plot_cost,
    plot_curves,
    read_records,
    save_both,
    shared_evaluations,
)
from sptseg.paper.maps import largest_class, mixed_images, square_sample
from sptseg.recipe import load_recipe
from sptseg.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"a class called {index}" for index in range(100)]
DRAWN = {"ablations", "branches", "choices", "classes", "cost", "curves", "filters", "qualitative"}
DRAWN |= {"gallery", "seen-unseen", "selection"}


def record(level, steps=(10, 20)):
    history = [{"iteration": step, "mIoU(S)": level, "mIoU(U)": level / 2, "hIoU": level / 1.5} for step in steps]
    iou = {name: (level + 7 * index) % 100 for index, name in enumerate(NAMES)}
    return {"metrics": {**history[-1], "IoU": iou}, "history": {"val": history, "train": []}}


def draw_all():
    """Name → figure, from invented numbers."""
    torch.manual_seed(0)
    runs = {"ZegCLIP": [record(30), record(33)], "SPT-SEG": [record(50), record(52)], "another one": [record(12)]}
    images, cosines = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8), torch.rand(2, 3, 6, 6) * 2 - 1
    return {
        "curves": plot_curves(runs, {"training-free CLIP": record(20)}),
        "few classes": plot_classes(runs, NAMES[:20], [3, 19]),
        "many classes": plot_classes(runs, NAMES, [3, 99]),
        "ablations": plot_ablations({"Table": {**runs, "a row that was not run at all": []}, "other": runs}),
        "cost": plot_cost({"ZegCLIP": (1e8, [30, 33]), "SPT-SEG": (2e8, [50])}),
        "filters": plot_filters(SpectralPrompt(grid=(6, 9), width=8)),
        "selection": plot_selection(list(images), cosines),
    }


@pytest.fixture(scope="module")
def figures():
    yield draw_all()
    plt.close("all")


def test_figures_are_as_wide_as_a_column_or_a_page_and_text_lies_inside(figures):
    for name, figure in figures.items():
        assert figure.get_figwidth() in (COLUMN, PAGE), name
        figure.draw_without_rendering()
        ticks = {text for axis in figure.axes for text in axis.get_xticklabels()}  # may lie beyond the axis: not drawn
        for text in set(figure.findobj(Text)) - ticks:
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 5, (name, text)
                extent = text.get_window_extent()
                assert extent.x0 >= -1 and extent.x1 <= figure.bbox.x1 + 1, (name, text.get_text())


def test_another_process_and_another_style_give_the_same_bytes(tmp_path):
    program = "import sys; sys.path.insert(0, sys.argv[2]); import test_figures as t\n"
    program += "for name, figure in t.draw_all().items(): t.save_both(figure, sys.argv[1], name)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", program, str(tmp_path / "there"), str(ROOT / "tests")]
    subprocess.run(command, check=True, env=environment)
    with plt.style.context({"font.size": 20, "savefig.bbox": "tight", "savefig.dpi": 30}):
        paths = [path for name, figure in draw_all().items() for path in save_both(figure, tmp_path / "here", name)]
    assert len(paths) == 14
    for path in paths:
        content = path.read_bytes()
        assert content == (tmp_path / "there" / path.name).read_bytes(), path.name
        assert b"CreationDate" not in content and b"Software" not in content


def test_rows_without_runs_are_named_and_marked(figures):
    written = [text.get_text() for text in figures["ablations"].findobj(Text)]
    assert written.count("not measured") == 1 and any("not run" in text.replace("\n", " ") for text in written)


def test_classes_of_all_methods_are_drawn_and_unseen_ones_are_marked(figures):
    axes = [axis for axis in figures["many classes"].axes]
    labels = [text.get_text() for axis in axes for text in axis.get_yticklabels()]
    assert len(labels) == 100 and [text for text in labels if text.endswith("*")] == labels[-2:]
    assert sorted(text.removesuffix(" *") for text in labels) == sorted(NAMES)


def test_means_spreads_and_order():
    assert mean_spread([1, None, 3]) == (2, pytest.approx(2**0.5))
    assert np.isnan(mean_spread([7])[1]) and np.isnan(mean_spread([])[0])
    assert class_order([5.0, 1.0, float("nan"), 9.0, 2.0], [0, 4]) == [3, 1, 2, 0, 4]


def test_curves_hold_only_what_all_runs_have():
    points = shared_evaluations([record(30, (10, 20, 30)), record(40, (10, 30))])
    assert points["iteration"].tolist() == [10, 10, 30, 30] and points["mIoU(S)"].tolist() == [30, 40, 30, 40]


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    name = "table1/glyphs-20/spt-seg"
    save_json(tmp_path / name / "seed0.json", {"metrics": {}})
    assert found_records(tmp_path, name, [0, 1]) == [{"metrics": {}}]
    with pytest.raises(UserError, match="seed1.json: is missing") as error:
        read_records(tmp_path, name, [0, 1])
    words = shlex.split(str(error.value).partition("make it: ")[2])
    assert words[0] == "papermill" and (ROOT / words[1]).is_file() and (ROOT / words[words.index("-f") + 1]).is_file()
    parameters = papermill.inspect_notebook(ROOT / words[1])
    given = {words[index + 1] for index, word in enumerate(words) if word == "-p"}
    assert given == {"seed", "out", "record"} and given <= parameters.keys()


def benchmark_of(masks):
    samples = [Sample(torch.randint(0, 256, (3, *mask.shape), dtype=torch.uint8), mask, "") for mask in masks]
    labels = LabelSet(name="x", classes=("a", "b", "c"), unseen=(2,), templates=("{}",))
    return Benchmark(labels, None, samples)


def test_images_with_seen_and_unseen_classes_come_first():
    kinds = ((0, 1), (0, 2), (2, IGNORE), (1, 2), (IGNORE, IGNORE))
    masks = [torch.tensor([[low, high]], dtype=torch.uint8).repeat(8, 4) for low, high in kinds]
    assert mixed_images(benchmark_of(masks), 2) == [1, 3]
    assert mixed_images(benchmark_of(masks), 4) == [1, 3, 0, 2]
    assert largest_class(masks[1], [0, 1]) == 0 and largest_class(masks[0], [2]) is None


def test_a_square_is_cut_from_the_middle_of_image_and_mask():
    mask = torch.zeros(20, 41, dtype=torch.uint8)
    mask[:, 10:30] = 1
    sample, normal = square_sample(benchmark_of([mask]), 0, 32)
    assert sample.image.shape == normal.shape[1:] == (3, 32, 32) and sample.mask.eq(1).all()


def test_a_strong_filter_is_found_and_shown_where_it_is():
    spectral = SpectralPrompt(grid=(8, 8), width=5)
    spectral.filter.data[1, 2, 3] = 9.0
    (channel,), responses, kernels = filter_images(spectral, 1)
    assert channel == 3 and np.unravel_index(responses.argmax(), responses.shape[:2]) == (5, 2)
    assert kernels.shape == (8, 8, 1)


def test_power_and_component_of_a_wave():
    columns = torch.arange(16) / 16
    wave = torch.cos(2 * torch.pi * 4 * columns).expand(2, 16, 16)[..., None] * torch.tensor([1.0, 2.0])
    distance, power = power_by_frequency(wave + torch.randn(2, 16, 16, 2) * 1e-3)
    assert distance[power.argmax()] == 0.25
    component = torch.from_numpy(principal_map(wave)).float()
    assert component.abs().max() == 1
    assert F.cosine_similarity(component.flatten(), wave[..., 0].flatten(), dim=0).abs() > 0.999


def test_the_notebook_draws_every_figure_and_draws_it_again_alike(kernel, tmp_path):
    results, runs = tmp_path / "results", tmp_path / "runs"
    for method in ("zegclip", "spt-seg"):
        name = f"table1/glyphs-20/{method}"
        recipe = load_recipe("demo/smoke", method=method, iterations=2, eval_every=1)
        save_json(results / name / "seed0.json", train(recipe, runs / name / "seed0", progress=False))
    places = {"results": str(results), "runs": str(runs), "seeds": [0]}
    for folder in ("first", "second"):
        kernel("figures", tmp_path, **places, folder=str(tmp_path / folder))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / part).iterdir()} for part in ("first", "second")
    )
    drawn = {f"glyphs-20-{name}.{suffix}" for name in DRAWN for suffix in ("pdf", "png")}
    assert first.keys() == drawn | {"glyphs-20-method.svg", "glyphs-20-spectral-prompt.svg"}
    assert not re.findall(rb"/Type3\b", first["glyphs-20-curves.pdf"])
    assert [name for name in first if first[name] != second[name]] == []
