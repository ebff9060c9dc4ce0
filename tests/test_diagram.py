"""The diagrams of the method: every number is the model's, text fits, and the same model gives the same bytes."""

import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from open_clip.transformer import VisionTransformer
from PIL import ImageFont

from sptseg.core import UserError, asset_path
from sptseg.models.prompts import SpectralPrompt
from sptseg.models.segmenter import METHODS, SegmenterConfig, build_segmenter
from sptseg.paper.diagram import (
    PLACEHOLDER,
    draw_method,
    draw_spectral_prompt,
    fill_template,
    hollow_segmenter,
    record_shapes,
    save_svg,
    spectral_example,
    times,
)

ROOT = Path(__file__).resolve().parents[1]
BASE, TINY = "ViT-B-16-quickgelu", "glyph-clip"
VARIANTS = {
    "spt-seg": (BASE, METHODS["spt-seg"], 20),
    "zegclip": (BASE, METHODS["zegclip"], 20),
    "one layer, late blocks": (BASE, SegmenterConfig(decoder_layers=1, spectral_blocks="11-12"), 20),
    "five layers, all blocks": (BASE, SegmenterConfig(decoder_layers=5, spectral_blocks="1-12"), 20),
    "coco-stuff": (BASE, SegmenterConfig(num_prompts=100), 171),
    "tiny": (TINY, SegmenterConfig(image_size=96), 20),
    "tiny zegclip, two layers": (TINY, SegmenterConfig(image_size=96, decoder="zegclip", decoder_layers=2), 20),
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def variant(request):
    return hollow_segmenter(*VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny():
    return hollow_segmenter(*VARIANTS["tiny"])


def diagrams_of(model, shapes):
    drawn = [draw_method(model, shapes)]
    return drawn + ([draw_spectral_prompt(model, shapes)] if model.encoder.spectral_prompt else [])


def texts_of(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def without_images(svg):
    return re.sub(r"data:image/png;base64,[\w+/=]+", "", svg)


def test_shapes_are_those_of_a_real_model():
    visual = VisionTransformer(32, 8, width=32, layers=3, heads=2, mlp_ratio=4, output_dim=24)
    model = build_segmenter(visual, SegmenterConfig(image_size=32, spectral_blocks="1-2", num_prompts=5)).eval()
    images, text = torch.randn(2, 3, 40, 32), torch.randn(7, 24)
    shapes = record_shapes(model, images, text)
    patches, cls = model.encoder(images)
    assert (shapes["encoder"], shapes["encoder[1]"]) == (patches.shape, cls.shape)
    assert shapes["masks"] == model(images, text).shape == (2, 7, 5, 4)
    assert (shapes["rfft2"], shapes["irfft2"]) == ((2, 5, 3, 32), (2, 5, 4, 32))
    assert shapes["rfft2 input"] == (2, 5, 4, 32)
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


def test_every_product_in_a_diagram_was_recorded(variant):
    model, shapes = variant
    known = set(shapes.values()) | {shape[1:] for shape in shapes.values()}
    known |= {shapes["encoder.spectral_prompt.filter"][:3]} if model.encoder.spectral_prompt else set()
    known |= {tuple(model.encoder.visual.patch_size), (3, 3)}  # patches; windows of the decoder
    known |= {(shapes["encoder.visual.ln_post"][1], shapes["encoder.visual.proj"][1])}  # projected tokens
    known |= {(shapes["encoder.run_block"][1] + shapes["encoder.deep_prompts"][1], shapes["encoder.deep_prompts"][2])}
    for svg in diagrams_of(model, shapes):
        written = " ".join(texts_of(svg))
        found = {tuple(map(int, product.split("×"))) for product in re.findall(r"\d+(?:×\d+)+", written)}
        assert len(found) >= 3 and found <= known


def test_the_diagram_shows_the_shapes_and_parts_of_the_model(variant):
    model, shapes = variant
    texts = texts_of(draw_method(model, shapes))
    written = "\n".join(texts)
    for name in (
        "images",
        "encoder.visual.ln_pre",
        "encoder",
        "masks",
        "resized",
        "labels",
        "decoder.query_projection",
    ):
        assert times(shapes[name][1:]) in written, name
    blocks, layers = len(model.encoder.visual.transformer.resblocks), len(model.decoder.layers)
    assert [text for text in texts if text.isdigit()] == [str(number) for number in range(1, blocks + 1)]
    assert f"decoder layer × {layers + 1}" in written and ("feed-forward" in written) == (layers > 0)
    assert ("spectral prompt" in written) == (model.encoder.spectral_prompt is not None)
    assert f"{sum(p.numel() for p in model.trained_tensors().values()) / 1e6:.2f} million" in written
    assert f"{shapes['text'][0]} classes" in written


def test_boxes_are_coloured_by_what_is_trained(tiny):
    model, shapes = tiny

    def kinds():
        groups = ElementTree.fromstring(draw_method(model, shapes)).iter(f"{SVG}g")
        return {"".join(group.itertext()).strip(): group.get("class") for group in groups if group.get("class")}

    before = kinds()
    assert before["LayerNorm of prompts"] == "learned" and before["CLIP’s last LayerNorm"] == "frozen"
    assert before["L2 normalization"] == "plain" and before["1"] == "frozen"
    model.encoder.visual.ln_post.weight.requires_grad_(True)
    try:
        assert kinds() == {**before, "CLIP’s last LayerNorm": "learned"}
    finally:
        model.encoder.visual.ln_post.weight.requires_grad_(False)


def test_every_placeholder_is_filled_and_unknown_ones_are_named(variant):
    for svg in diagrams_of(*variant):
        assert not PLACEHOLDER.search(svg)
        assert not re.search(r"[{}]", re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL))
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    with pytest.raises(UserError, match=r"block_prompts.svg: no value for the placeholders \['middle'\]"):
        fill_template("block_prompts.svg", {"midle": 1})
    with pytest.raises(UserError, match="missing"):
        fill_template("methods.svg", {})


def test_every_template_is_used():
    source = (ROOT / "sptseg/paper/diagram.py").read_text(encoding="utf-8")
    for path in asset_path("templates").glob("*.svg"):
        stem = re.sub("_(sgd|zegclip)$", "_", path.stem)
        assert re.search(rf'"{stem}(\.svg"|"|\{{)', source), path.name


@lru_cache
def font(size, bold):  # DejaVu Sans is wider than the other fonts that the templates name
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(font_manager.findfont(f"DejaVu Sans:weight={weight}"), size)


def extent(text):
    """Left and right end of a text element."""
    title = text.get("class") == "title"
    width = font(18 if title else 14, title).getlength("".join(text.itertext()))
    return float(text.get("x")), width


def test_text_fits_into_boxes_and_lies_within_the_diagram(variant):
    for svg in diagrams_of(*variant):
        root = ElementTree.fromstring(svg)
        for group in root.iter(f"{SVG}g"):
            rect = group.find(f"{SVG}rect")
            if group.get("class") in ("learned", "frozen", "plain"):
                left, right = float(rect.get("x")), float(rect.get("x")) + float(rect.get("width"))
                for text in group.findall(f"{SVG}text"):
                    if text.get("x"):  # the others are rotated
                        middle, width = extent(text)
                        assert left + 2 < middle - width / 2 and middle + width / 2 < right - 2, texts_of(svg)
        inside = {text for group in root.iter(f"{SVG}g") if group.get("class") != "panel" for text in group}
        for text in set(root.iter(f"{SVG}text")) - inside:
            start, width = extent(text)
            start -= {"middle": width / 2, "end": width}.get(text.get("class"), 0)
            assert 0 <= start and start + width <= 1200, "".join(text.itertext())


DRAW_TINY = """
import sys
from sptseg.paper.diagram import *
from sptseg.models.segmenter import SegmenterConfig
model, shapes = hollow_segmenter("glyph-clip", SegmenterConfig(image_size=96))
save_svg(draw_method(model, shapes) + draw_spectral_prompt(model, shapes), sys.argv[1])
"""


def test_another_process_gives_the_same_bytes(tiny, tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", DRAW_TINY, str(tmp_path / "there.svg")], check=True, env=environment)
    here = save_svg("".join(diagrams_of(*tiny)), tmp_path / "here.svg")
    assert here.read_bytes() == (tmp_path / "there.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.svg", "there.svg"]


@pytest.mark.parametrize(("draw", "name"), [(draw_method, "method"), (draw_spectral_prompt, "spectral_prompt")])
def test_kept_diagrams_are_up_to_date(draw, name):
    kept = (ROOT / f"figures/{name}.svg").read_text(encoding="utf-8")
    again = draw(*hollow_segmenter(*VARIANTS["spt-seg"]))
    assert len(kept) <= 100_000
    assert without_images(kept) == without_images(again), "run nbs/80_paper.diagram.ipynb"


def test_a_model_without_spectral_prompt_is_refused():
    with pytest.raises(UserError, match="no spectral prompt"):
        draw_spectral_prompt(*hollow_segmenter(TINY, SegmenterConfig(image_size=96, spectral_blocks="")))


def test_a_learned_filter_can_be_shown(tiny):
    learned = draw_spectral_prompt(*tiny, torch.ones(12, 7, dtype=torch.complex64))
    assert "random" in " ".join(texts_of(draw_spectral_prompt(*tiny)))
    assert "random" not in " ".join(texts_of(learned))


@torch.no_grad()
def test_the_example_does_what_the_spectral_prompt_does():
    prompt = SpectralPrompt(grid=(8, 8), width=1)
    maps = spectral_example((8, 8), prompt.spectrum((8, 8))[..., 0])
    added = prompt(torch.ones(1, 1), torch.from_numpy(maps["H"]).reshape(1, 64, 1), (8, 8))
    assert np.allclose(maps["S"], added.reshape(8, 8).numpy(), atol=1e-5)
    assert np.allclose(maps["sum"], maps["H"] + maps["S"])
