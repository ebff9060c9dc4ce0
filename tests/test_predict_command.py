"""`sptseg predict`: files, resuming without mixing, and bad input."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import sptseg
from sptseg.cli import main
from sptseg.core import asset_path
from sptseg.inference.folders import label_files, list_images
from test_cli import refusal, snapshot

NAMES = ["red heart", "green cat", "yellow heart"]
EXAMPLES = asset_path("examples")


def predict(*arguments, names=None):
    names = names or ", ".join(NAMES)
    return main(["predict", "spt-seg-glyphs", *map(str, arguments), "--classes", names, "--quiet"])


@pytest.fixture
def photos(tmp_path):
    """Two images in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("scene-1", "scene-2"):
        (folder / f"{name}.png").write_bytes((EXAMPLES / f"{name}.png").read_bytes())
    return folder


def test_masks_overlays_and_legend(photos, tmp_path, capsys):
    out, model = tmp_path / "out", sptseg.load("spt-seg-glyphs")
    assert predict(photos, "--out", out, "--scores", "--threshold", 0.1) == 0
    assert "labelled 2 images" in capsys.readouterr().out
    legend = json.loads((out / "legend.json").read_text())
    assert legend["classes"] == NAMES and legend["none"] == 255 and legend["options"]["threshold"] == 0.1
    for path in photos.iterdir():
        expected = model.predict(path, NAMES, threshold=0.1, scores=True)
        with Image.open(out / path.name) as mask:
            assert mask.mode == "P" and (np.asarray(mask) == expected.labels).all()
            colour = mask.convert("RGB").getpixel((0, 0))
        assert colour == (255, 255, 255) or expected.labels[0, 0] != 255
        scores = np.load(out / f"{path.stem}-scores.npy")
        assert scores.dtype == np.float16 and np.allclose(scores, expected.scores, atol=1e-3)
        assert Image.open(out / f"{path.stem}-overlay.png").width > 512


def test_a_list_of_more_than_255_names_gives_16_bits(photos, tmp_path):
    words = ["red", "yellow", "green", "blue", "purple"]
    names = [f"{one} {two} {three} heart" for one in words for two in words for three in words]
    names += [name.replace("heart", "cat") for name in names] + [
        f"{one} {two} knight" for one in words for two in words
    ]
    (tmp_path / "names.txt").write_text("\n".join(names))
    arguments = ["predict", "spt-seg-glyphs", photos / "scene-1.png", "--classes-file", tmp_path / "names.txt"]
    assert main([*map(str, arguments), "--out", str(tmp_path / "out"), "--quiet", "--threshold", "0.2"]) == 0
    labels = np.asarray(Image.open(tmp_path / "out/scene-1.png"))
    assert len(names) > 255 and Image.open(tmp_path / "out/scene-1.png").mode == "I;16"
    assert set(np.unique(labels)) <= {*range(len(names)), 65535} and (labels == 65535).any()


def test_a_call_goes_on_where_it_stopped(photos, tmp_path, monkeypatch, capsys):
    out, label = tmp_path / "out", sptseg.Predictor.label
    calls = []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return label(self, *arguments)

    monkeypatch.setattr(sptseg.Predictor, "label", stop)
    assert predict(photos, "--out", out) == 130 and "the same command" in capsys.readouterr().err
    before = snapshot(out)
    assert predict(photos, "--out", out) == 0 and len(calls) == 3
    assert "labelled 1 image, 1 were there already" in capsys.readouterr().out
    assert {path: snapshot(out)[path] for path in before if path.name != "legend.json"}.items() <= before.items()
    Image.open(EXAMPLES / "scene-3.png").save(photos / "scene-1.png")
    assert predict(photos, "--out", out) == 0 and len(calls) == 4, "another image of the same name is labelled"


def test_results_of_other_names_or_options_are_never_mixed(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(photos, "--out", out) == 0
    (out / "notes.png").write_bytes((EXAMPLES / "scene-1.png").read_bytes())
    before = snapshot(out)
    common = ("predict", "spt-seg-glyphs", photos, "--out", out, "--quiet", "--classes")
    assert "other classes" in refusal(capsys, *common, "red heart, green cat")
    assert "other options" in refusal(capsys, *common, ", ".join(NAMES), "--threshold", 0.2)
    assert "other model" in refusal(capsys, common[0], "zegclip-glyphs", *common[2:], ", ".join(NAMES))
    assert snapshot(out) == before
    assert predict(photos / "scene-1.png", "--out", out, "--overwrite", names="red heart, green cat") == 0
    assert {path.name for path in out.glob("*.png")} == {"scene-1.png", "scene-1-overlay.png", "notes.png"}


def test_a_copy_of_the_model_is_the_same_model(photos, tmp_path, capsys):
    (tmp_path / "copy.safetensors").write_bytes(
        (asset_path("models") / "spt-seg-glyphs/model.safetensors").read_bytes()
    )
    assert predict(photos, "--out", tmp_path / "out") == 0
    arguments = ("predict", tmp_path / "copy.safetensors", photos, "--out", tmp_path / "out", "--quiet", "--classes")
    assert main([*map(str, arguments), ", ".join(NAMES)]) == 0
    assert "labelled 0 images, 2 were there already" in capsys.readouterr().out


def test_broken_images_are_named_and_the_others_done(photos, tmp_path, capsys):
    content = (photos / "scene-1.png").read_bytes()
    for name, bad in {"cut.png": content[:500], "empty.jpg": b"", "text.png": b"hello"}.items():
        (photos / name).write_bytes(bad)
    assert predict(photos, "--out", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert "labelled 2 images, 3 failed" in shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in ("cut.png", "empty.jpg", "text.png"))
    assert len(list((tmp_path / "out").glob("scene-*.png"))) == 4


BAD = {
    "no classes": (["--classes", " , "], "no names"),
    "a name twice": (["--classes", "red cat,red cat"], "'red cat' is named twice"),
    "an unknown word": (["--classes", "zeppelin"], "zeppelin"),
    "an empty file of names": (["--classes-file", "names.txt"], "names.txt"),
    "a wrong threshold": (["--threshold", "7"], "threshold"),
    "an unknown device": (["--device", "abacus"], "device: 'abacus'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_written(photos, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").touch()
    line = refusal(capsys, "predict", "spt-seg-glyphs", photos, "--out", tmp_path / "out", "--quiet", *options)
    assert message in line and not (tmp_path / "out").exists()


def test_bad_paths_are_refused(photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out, common = tmp_path / "out", ("predict", "spt-seg-glyphs")
    assert "holds no images" in refusal(capsys, *common, tmp_path / "empty", "--out", out)
    assert "does not exist" in refusal(capsys, *common, tmp_path / "nowhere.png", "--out", out)
    assert "folder of the images" in refusal(capsys, *common, photos, "--out", photos)
    assert "would be overwritten" in refusal(capsys, *common, photos / "scene-1.png", "--out", photos)
    (tmp_path / "scene-1.jpg").write_bytes((photos / "scene-1.png").read_bytes())
    assert "same file" in refusal(capsys, *common, photos, tmp_path / "scene-1.jpg", "--out", out)
    glyph_clip = asset_path("glyph_clip/model.safetensors")
    assert "not written by sptseg" in refusal(capsys, "predict", glyph_clip, photos, "--out", out)
    out.mkdir()
    (out / "scene-1.png").write_bytes((photos / "scene-2.png").read_bytes())
    assert "was not written by sptseg" in refusal(capsys, *common, photos, "--out", out, "--quiet")
    (out / "scene-1.png").rename(out / "scene-2-overlay.png")
    assert "scene-2-overlay.png: exists and was not" in refusal(capsys, *common, photos, "--out", out, "--quiet")
    assert str(photos / "scene-1.png") in refusal(capsys, *common, photos, "--out", photos / "scene-1.png", "--quiet")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert str(tmp_path / "out") in refusal(capsys, "predict", "spt-seg-glyphs", photos, "--out", tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_loaded(photos, tmp_path, capsys, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("sptseg.inference.predictor.load", None)
    (tmp_path / "notes").write_text("a file")
    line = refusal(capsys, "predict", "spt-seg-glyphs", photos, "--out", tmp_path / "notes/labels")
    assert f"{tmp_path / 'notes'}: is a file; choose a folder" in line
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    line = refusal(capsys, "predict", "spt-seg-glyphs", photos, "--out", tmp_path / "new/labels")
    assert f"{tmp_path / 'new/labels'}: cannot be written (Permission denied); choose another folder" in line
    assert not (tmp_path / "new").exists()


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["spt-seg-glyphs", "zegclip-glyphs"]


def test_the_function_behind_the_command_has_no_bar_unless_asked(photos, tmp_path, capsys):
    model = sptseg.load("spt-seg-glyphs")
    images = list_images([photos], tmp_path / "out")
    outcome = label_files(model, images, tmp_path / "out", model.query(NAMES), progress=False)
    assert outcome.labelled == ["scene-1", "scene-2"] and not capsys.readouterr().err
