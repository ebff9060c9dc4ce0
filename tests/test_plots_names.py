"""Names are drawn as they are written."""

import warnings

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from sptseg import plots  # noqa: E402
from sptseg.data.label_sets import LabelSet  # noqa: E402
from sptseg.data.report import show_report  # noqa: E402
from sptseg.data.survey import survey  # noqa: E402
from sptseg.data.transforms import Sample  # noqa: E402
from sptseg.plots import add_fonts, drawn_name, font_letters, plot_class_iou, show_images, show_segmentations  # noqa: E402

NAMES = [
    "$5 and $10",
    r"$\frac{a$",
    r"a\$b$c",
    "_under_score",
    "x^2 {y} 50%",
    r"back\slash",
    "Größe",
    "猫",
    "$$",
    r"\$",
]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(plots, "MISSING", set())
    with plt.rc_context(), warnings.catch_warnings():
        yield
    plt.close("all")


def texts(figure):  # what is seen: texts after matplotlib's treatment of dollars
    figure.draw_without_rendering()
    found = []
    for text in figure.findobj(matplotlib.text.Text):
        shown, is_math = text._preprocess_math(text.get_text())
        assert not is_math or shown.startswith(r"$\mathdefault"), shown  # as the ticks of a logarithmic axis
        found.append(shown)
    return found


@pytest.mark.filterwarnings("ignore:.*no installed font")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is_written(name):
    others = [name, "other"]
    mask = (torch.arange(64).view(8, 8) % 2).to(torch.uint8)
    image = mask.expand(3, 8, 8) * 200
    figure = show_segmentations([{"image": image, "truth": mask}], others, unseen=(1,))
    assert name in texts(figure) and "other *" in texts(figure)
    assert name in texts(plot_class_iou({"run": {name: 10.0, "other": 20.0}}, others))
    assert name in texts(show_images([image], [name]))
    labels = LabelSet("two", tuple(others), unseen=(1,))
    data = [Sample(image, mask, str(index)) for index in range(2)]
    shown = texts(show_report(survey(labels, data, progress=False), data))
    assert f"{name}  0" in shown and name in shown


def other_letters():
    "Letters that DejaVu Sans lacks, of another installed font (STIX comes with matplotlib)."
    sans, stix = (font_letters(plots.font_manager.findfont(name)) for name in ("DejaVu Sans", "STIXGeneral"))
    return sorted(letter for letter in stix - sans if letter.isalpha())


def test_a_font_that_has_the_letters_is_added(recwarn):
    before, letters = list(plt.rcParams["font.family"]), other_letters()
    assert add_fonts("plain") == set() and plt.rcParams["font.family"] == before
    name = "".join(letters[:3])
    figure = show_images([np.zeros((4, 4))], [name])
    figure.canvas.draw()  # matplotlib warns of a letter without a font
    assert len(plt.rcParams["font.family"]) > len(before) and not recwarn
    assert drawn_name(name) == name and len(plt.rcParams["font.family"]) == len(before) + 1


def test_letters_without_a_font_are_warned_of_once():
    nowhere = "\U00010600"  # a sign of Linear A
    if not add_fonts(nowhere):
        pytest.skip("a font with this letter is installed")
    with pytest.warns(UserWarning, match=f"no installed font has {nowhere}"):
        drawn_name(f"cat {nowhere}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn_name(f"{nowhere}!") == f"{nowhere}!"
