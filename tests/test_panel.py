"""The notebook panel, driven as a browser would: by the values of its widgets."""

import io
from datetime import datetime, timezone

import numpy as np
import pytest
from PIL import Image

import sptseg
from sptseg.app.panel import LABELS, Panel, draw_view, png_bytes
from sptseg.inference.images import example_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return sptseg.load("spt-seg-glyphs")


@pytest.fixture
def panel(model):
    return Panel(model)


def upload(panel, content, name="mine.png"):
    item = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    panel.widgets["upload"].value = ({**item, "last_modified": datetime.now(timezone.utc)},)


def shown(panel):
    return np.asarray(Image.open(io.BytesIO(panel.widgets["image"].value)))


def test_the_panel_shows_the_labels_of_predict(panel, model):
    first = next(iter(example_images().values()))
    assert (panel.result.labels == model.predict(first, model.classes).labels).all()
    panel.widgets["names"].value = "red heart, green cat"
    panel.widgets["seen_bias"].value = 0.3
    expected = model.predict(first, ["red heart", "green cat"], seen_bias=0.3, scores=True)
    assert (panel.result.labels == expected.labels).all()
    assert (shown(panel) == np.asarray(expected.overlay())).all()
    panel.widgets["view"].value = "green cat"
    assert panel.widgets["image"].value == png_bytes(draw_view(expected, "green cat"))
    panel.widgets["names"].value = "red heart, yellow knight"
    assert panel.widgets["view"].value == LABELS, "the class of the score map is gone"


def test_names_and_options_do_not_encode_again(panel, monkeypatch):
    monkeypatch.setattr(panel.model, "encode", None)
    panel.widgets["names"].value = "red heart, green cat"
    panel.widgets["threshold"].value = 0.9
    assert (panel.result.labels == 255).mean() > 0.9


def test_an_upload_is_labelled_and_a_broken_one_named(panel, model):
    pixels = np.random.default_rng(0).integers(0, 255, (70, 110, 3), dtype=np.uint8)
    upload(panel, png_bytes(Image.fromarray(pixels)))
    assert panel.result.labels.shape == (70, 110)
    assert (panel.result.labels == model.predict(pixels, model.classes).labels).all()
    before = panel.result
    upload(panel, b"not an image", "text.png")
    assert panel.result is before and "text.png" in panel.widgets["status"].value
    panel.widgets["example"].value = list(example_images())[1]
    assert panel.result.labels.shape == (96, 96) and "span" not in panel.widgets["status"].value


@pytest.mark.parametrize("names", ["", "red heart, red heart", "purple cow", "<b>cow</b>"])
def test_names_that_cannot_be_used_give_a_sentence(panel, names):
    before = panel.result
    panel.widgets["names"].value = names
    assert panel.result is before
    assert "#b00020" in panel.widgets["status"].value and "<b>" not in panel.widgets["status"].value
