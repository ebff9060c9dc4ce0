"""The diagrams of the method: true to the model, legible, and the same bytes each time."""

import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from open_clip.transformer import VisionTransformer
from PIL import Image

from sptseg.core import UserError
from sptseg.models.segmenter import METHODS, SegmenterConfig, build_segmenter
from sptseg.paper.diagram import draw_method, draw_spectral_prompt, hollow_segmenter, record_shapes, save_figure

FIGURES = Path(__file__).resolve().parents[1] / "figures"
BASE, TINY = "ViT-B-16-quickgelu", "glyph-clip"
VARIANTS = {
    "spt-seg": (BASE, METHODS["spt-seg"], 20),
    "zegclip": (BASE, METHODS["zegclip"], 20),
    "one layer, late blocks": (BASE, SegmenterConfig(decoder_layers=1, spectral_blocks="11-12"), 20),
    "five layers, all blocks": (BASE, SegmenterConfig(decoder_layers=5, spectral_blocks="1-12"), 20),
    "coco-stuff": (BASE, SegmenterConfig(num_prompts=100), 171),
    "tiny": (TINY, SegmenterConfig(image_size=96), 20),
    "tiny zegclip+spt, two layers": (TINY, SegmenterConfig(image_size=96, decoder="zegclip", decoder_layers=2), 20),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def variant(request):
    return hollow_segmenter(*VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny():
    return hollow_segmenter(*VARIANTS["tiny"])


def figures_of(model, shapes):
    drawn = [draw_method(model, shapes)]
    return drawn + ([draw_spectral_prompt(model, shapes)] if model.encoder.spectral_prompt else [])


def test_shapes_are_those_of_a_real_model():
    visual = VisionTransformer(32, 8, width=32, layers=3, heads=2, mlp_ratio=4, output_dim=24)
    model = build_segmenter(visual, SegmenterConfig(image_size=32, spectral_blocks="1-2", num_prompts=5)).eval()
    images, text = torch.randn(2, 3, 40, 32), torch.randn(7, 24)
    shapes = record_shapes(model, images, text)
    patches, cls = model.encoder(images)
    assert (shapes["encoder"], shapes["encoder[1]"]) == (patches.shape, cls.shape)
    assert shapes["masks"] == model(images, text).shape == (2, 7, 5, 4)
    assert (shapes["rfft2"], shapes["irfft2"]) == ((2, 5, 3, 32), (2, 5, 4, 32))
    assert shapes["encoder.run_block input"] == (2, 1 + 20, 32) and shapes["encoder.deep_prompts"] == (2, 5, 32)
    assert shapes["decoder.last.hilo.low"][1:3] == (6, 6)
    assert (shapes["resized"], shapes["labels"]) == ((2, 7, 40, 32), (2, 40, 32))
    assert all(shapes[name] == parameter.shape for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_a_failure():
    visual = VisionTransformer(32, 8, width=32, layers=2, heads=2, mlp_ratio=4, output_dim=24)
    model = build_segmenter(visual, SegmenterConfig(image_size=32))
    with pytest.raises(RuntimeError):
        record_shapes(model, torch.randn(1, 3, 32, 32), torch.randn(4, 25))
    assert not any(module._forward_hooks for module in model.modules())


def test_every_product_in_the_image_was_recorded(variant):
    model, shapes = variant
    known = set(shapes.values()) | {shape[1:] for shape in shapes.values()}
    known |= {shapes["encoder.spectral_prompt.filter"][:3]} if model.encoder.spectral_prompt else set()
    known |= {tuple(model.encoder.visual.patch_size), (3, 3)}  # patches; windows of the decoder
    known |= {(shapes["encoder.visual.ln_post"][1], shapes["encoder.visual.proj"][1])}  # projected tokens
    known |= {shapes[name][1:3] for name in shapes if name.endswith("hilo.low")}  # the padded grid
    known |= {(shapes["encoder.run_block"][1] + shapes["encoder.deep_prompts"][1], shapes["encoder.deep_prompts"][2])}
    known |= {(*shapes["irfft2"][1:3], shapes["rfft2"][3])} if "rfft2" in shapes else set()
    for figure in figures_of(model, shapes):
        written = " ".join(text.get_text() for text in figure.axes[0].texts)
        found = {tuple(map(int, product.split("×"))) for product in re.findall(r"\d+(?:×\d+)+", written)}
        assert len(found) >= 3 and found <= known


def test_method_names_what_the_model_has(variant):
    model, shapes = variant
    written = "\n".join(text.get_text() for text in draw_method(model, shapes).axes[0].texts)
    blocks, layers = len(model.encoder.visual.transformer.resblocks), len(model.decoder.layers)
    assert all(f"\n{number}\n" in written for number in range(1, blocks + 1)) and f"\n{blocks + 1}\n" not in written
    assert f"decoder layer × {layers + 1}" in written and ("feed-forward" in written) == (layers > 0)
    assert ("spectral prompt" in written) == (model.encoder.spectral_prompt is not None)
    assert f"{sum(p.numel() for p in model.trained_tensors().values()) / 1e6:.2f} million" in written


def test_text_is_large_enough_and_nothing_overlaps(variant):
    for figure in figures_of(*variant):
        axis, renderer = figure.axes[0], figure.canvas.get_renderer()
        assert figure.get_figwidth() == 7
        extents = [(text, text.get_window_extent(renderer)) for text in axis.texts if text.get_text()]
        assert min(text.get_fontsize() for text, _ in extents) >= 6
        for text, extent in extents:
            assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, text.get_text()
            assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, text.get_text()
        for (first, one), (second, other) in combinations(extents, 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), (first.get_text(), second.get_text())


def test_text_in_boxes_fits(variant):
    for figure in figures_of(*variant):
        axis, renderer = figure.axes[0], figure.canvas.get_renderer()
        boxes = [patch for patch in axis.patches if patch.get_gid()]
        inside = [text for text in axis.texts if text.get_gid() == "in box" and text.get_text()]
        for patch, text in zip(boxes, inside, strict=True):
            assert patch.get_gid() == text.get_text()
            frame, extent = patch.get_window_extent(renderer), text.get_window_extent(renderer)
            assert frame.x0 < extent.x0 and extent.x1 < frame.x1, text.get_text()


def test_other_text_keeps_out_of_boxes(variant):
    for figure in figures_of(*variant):
        axis, renderer = figure.axes[0], figure.canvas.get_renderer()
        boxes = [patch.get_window_extent(renderer) for patch in axis.patches if patch.get_gid()]
        for text in axis.texts:
            if text.get_gid() != "in box" and text.get_text() not in ("", "❄"):
                extent = text.get_window_extent(renderer).padded(-1)
                assert not any(box.overlaps(extent) for box in boxes), text.get_text()


DRAW_TINY = """
import sys
from sptseg.paper.diagram import *
from sptseg.models.segmenter import SegmenterConfig
figure = draw_method(*hollow_segmenter("glyph-clip", SegmenterConfig(image_size=96)))
for path in sys.argv[1:]:
    save_figure(figure, path)
"""


def test_another_process_and_another_style_give_the_same_bytes(tiny, tmp_path):
    paths = [tmp_path / "there.png", tmp_path / "there.pdf"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", DRAW_TINY, *map(str, paths)], check=True, env=environment)
    for there in paths:
        with plt.style.context({"font.size": 20, "savefig.bbox": "tight", "lines.linewidth": 5, "figure.dpi": 50}):
            here = save_figure(draw_method(*tiny), tmp_path / f"here{there.suffix}")
        assert here.read_bytes() == there.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.pdf", "here.png", "there.pdf", "there.png"]


@pytest.mark.parametrize(("draw", "name"), [(draw_method, "method"), (draw_spectral_prompt, "spectral_prompt")])
def test_kept_images_are_up_to_date(draw, name, tmp_path):
    kept = FIGURES / f"{name}.png"
    again = save_figure(draw(*hollow_segmenter(*VARIANTS["spt-seg"])), tmp_path / kept.name)
    assert kept.stat().st_size <= 250_000
    with Image.open(kept) as old, Image.open(again) as new:
        if old.info["Software"] != new.info["Software"]:
            pytest.skip(f"{name}.png was drawn by {old.info['Software']}, which may draw other pixels")
        assert np.array_equal(np.asarray(old.convert("RGB")), np.asarray(new.convert("RGB"))), (
            "run nbs/80_paper.diagram.ipynb"
        )
    assert kept.read_bytes() == again.read_bytes()


def test_what_cannot_be_drawn_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="no spectral prompt"):
        draw_spectral_prompt(*hollow_segmenter(TINY, SegmenterConfig(image_size=96, spectral_blocks="")))
    with pytest.raises(UserError, match="figure.jpg"):
        save_figure(draw_method(*tiny), tmp_path / "figure.jpg")
    assert not list(tmp_path.iterdir())


def test_a_learned_filter_can_be_shown(tiny):
    constant = draw_spectral_prompt(*tiny, torch.ones(12, 7, dtype=torch.complex64))
    assert "random" in " ".join(text.get_text() for text in draw_spectral_prompt(*tiny).axes[0].texts)
    assert "random" not in " ".join(text.get_text() for text in constant.axes[0].texts)
