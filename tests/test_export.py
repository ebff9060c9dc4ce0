"""Exported models: one file that labels windows as `predict` does, or no file at all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch

import sptseg
from sptseg.app import export
from sptseg.app.export import Agreement, agreement, export_model
from sptseg.app.formats import FORMATS, NOTES_FILE, WindowModel, trace, without_fft
from sptseg.cli import main
from sptseg.core import UserError, asset_path
from sptseg.models.clip import ClipModel
from sptseg.models.segmenter import METHODS, FileNotes, SegmenterConfig, build_segmenter
from sync import ROOT

SIZE = 40  # a grid of 5×5 patches, which is odd and no multiple of the windows of the decoder
NAMES = ("cat", "dog", "sofa")
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}


def make_predictor(config, templates=("a {}.",), prepare=lambda segmenter: None):
    """A tiny model with random weights, which `prepare` may change."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=32, quick_gelu=True, vision_cfg=VISION, text_cfg=TEXT).eval().requires_grad_(False)
    segmenter = build_segmenter(model.visual, config).eval().requires_grad_(False)
    prepare(segmenter)
    known = {"classes": NAMES, "unseen": ("sofa",), "setting": "inductive", "templates": templates, "seen_bias": 0.01}
    notes = FileNotes(clip="tiny", stride=30, mean=(120, 110, 100), std=(60, 50, 40), method="spt-seg", **known)
    source, apart = {"name": "tiny", "sha256": "0" * 64}, [len(templates)] * config.templates_apart
    text = torch.nn.functional.normalize(torch.randn(3, *apart, 32), dim=-1)
    return sptseg.Predictor(segmenter, ClipModel("tiny", model, "0" * 64), notes, text, source, "cpu")


def make_selective(segmenter):
    """A spectral prompt that matters, a task token that selects, and scores far from 1/2."""
    segmenter.encoder.spectral_prompt.filter.normal_(std=1.0)
    with torch.no_grad():
        features, _ = segmenter.encoder(torch.randn(8, 3, SIZE, SIZE))
        last = segmenter.decoder.last
        last.selection.task_token.copy_(last.hilo(features).mean((0, 1)))
        last.selection.transform.mul_(100)


@pytest.fixture(scope="module")
def predictor():
    config = SegmenterConfig(image_size=SIZE, num_prompts=2, spectral_blocks="1", decoder_layers=1)
    return make_predictor(config, prepare=make_selective)


@pytest.fixture(scope="module")
def fixed(predictor, tmp_path_factory):
    """An ONNX file of the training's names, and the report."""
    path = tmp_path_factory.mktemp("fixed") / "model.onnx"
    return path, export_model(predictor, path)


def random_images(count):
    return [np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for seed in range(count)]


def windows(images, notes):
    """As the notes in a file say."""
    pixels = np.stack([(image - np.array(notes["mean"])) / notes["std"] for image in images])
    return pixels.transpose(0, 3, 1, 2).astype(np.float32)


def onnx_notes(session):
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


def assert_equal_to_predict(scores, labels, results):
    expected = np.stack([result.scores for result in results]), np.stack([result.labels for result in results])
    found = agreement(scores, labels, *expected)
    assert found.holds and found.score_error < 1e-5, found
    assert labels.dtype == np.int64 and scores.dtype == np.float32


def test_onnx_file_labels_batches_of_any_size_as_predict_does(fixed, predictor):
    session = onnxruntime.InferenceSession(fixed[0])
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["batch", 3, SIZE, SIZE])]
    for count in (1, 4):
        images = random_images(count)
        found = session.run(["scores", "labels"], {"images": windows(images, onnx_notes(session))})
        results = predictor.predict(images, scores=True)
        assert all(np.ptp(result.scores) > 0.2 for result in results)
        assert_equal_to_predict(*found, results)


def test_the_file_says_what_it_is(fixed, predictor):
    notes = onnx_notes(onnxruntime.InferenceSession(fixed[0]))
    assert notes["classes"] == list(NAMES) and notes["biased"] == ["cat", "dog"] and notes["seen_bias"] == 0.01
    assert (notes["image_size"], notes["mean"], notes["std"]) == (SIZE, [120, 110, 100], [60, 50, 40])
    assert notes["model"] == predictor.source and notes["method"] == "spt-seg" and notes["open_vocabulary"] is False
    assert set(notes["export"]["versions"]) >= {"torch", "sptseg"} and set(notes["outputs"]) == {"scores", "labels"}


def test_the_report_holds_what_was_measured(fixed):
    path, report = fixed
    assert report.agreement.holds and report.speed > 0 and report.torch_speed > 0
    lines = str(report).splitlines()
    assert f"{path.stat().st_size / 1e6:.1f} MB" in lines[1] and "onnxruntime" in lines[2] and len(lines) == 3
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_an_open_vocabulary_takes_other_names(predictor, tmp_path):
    """Here as a program; the notebook does the same with ONNX."""
    assert_open_vocabulary(predictor, tmp_path / "open.pt2")
    assert np.array_equal(np.load(tmp_path / "open.npy"), predictor.query(NAMES).text.numpy())


def assert_open_vocabulary(predictor, path):
    """A file takes other numbers of names and gives the scores of `predict`."""
    export_model(predictor, path, NAMES, open_vocabulary=True)
    run, images = FORMATS["onnx" if path.suffix == ".onnx" else "torch-export"].open(path), random_images(2)
    pixels = torch.from_numpy(windows(images, {"mean": predictor.notes.mean, "std": predictor.notes.std}))
    for names in (NAMES, ("tree",), ("tree", "sofa", "lamp", "cat", "bird")):
        found = run([pixels, predictor.query(names).text])
        assert_equal_to_predict(*found, predictor.predict(images, names, seen_bias=0, scores=True))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_rounds_of_transport_end_in_a_file_as_in_the_model(suffix, tmp_path):
    """The rounds of an image depend neither on the image beside it nor on a model that was traced before."""
    config = METHODS["otseg"].model_copy(update={"image_size": SIZE, "num_prompts": 2, "decoder_layers": 1})
    predictor = make_predictor(config, templates=("a {}.", "the {}."))
    trace(WindowModel(without_fft(predictor.segmenter), predictor.query(("cat", "dog")).text), SIZE, ())
    assert_open_vocabulary(predictor, tmp_path / f"model{suffix}")


def test_proposals_of_two_stages_are_cut_out_in_an_onnx_file(tmp_path):
    config = METHODS["two-stage"].model_copy(update={"image_size": SIZE, "proposals": 3, "decoder_layers": 1})
    predictor = make_predictor(config)
    with torch.no_grad():
        predictor.segmenter.encoder.proposer.queries.mul_(100)  # masks that differ
    assert_open_vocabulary(predictor, tmp_path / "model.onnx")


def test_a_program_is_run_by_pytorch_alone(predictor, tmp_path):
    names = ("lamp", "cat")
    report = export_model(predictor, tmp_path / "model.pt2", names, seen_bias=0.3, templates="the {}")
    program = torch.export.load(tmp_path / "model.pt2", extra_files=(files := {NOTES_FILE: ""})).module()
    notes = json.loads(files[NOTES_FILE])
    assert notes["classes"] == list(names) and notes["templates"] == ["the {}"] and notes["seen_bias"] == 0.3
    for count in (1, 3):
        images = random_images(count)
        with torch.inference_mode():
            found = [output.numpy() for output in program(torch.from_numpy(windows(images, notes)))]
        options = {"seen_bias": 0.3, "templates": "the {}", "scores": True}
        assert_equal_to_predict(*found, predictor.predict(images, names, **options))
    assert report.runtime == "exported program"


def test_the_lines_of_the_notebook_need_no_pytorch(fixed):
    cells = json.loads((ROOT / "nbs/76_app.export.ipynb").read_text(encoding="utf-8"))["cells"]
    [block] = [text for cell in cells if "onnxruntime.InferenceSession(onnx_file)" in (text := "".join(cell["source"]))]
    assert len([line for line in block.splitlines() if line]) <= 10
    start = f"import sys; sys.modules['torch'] = sys.modules['sptseg'] = None; onnx_file = {str(fixed[0])!r}\n"
    start += f"asset_path = lambda name: {str(asset_path('.'))!r} + '/' + name\n"
    done = subprocess.run([sys.executable, "-c", start + block], capture_output=True, text=True)
    assert done.returncode == 0 and any(name in done.stdout for name in NAMES), done.stderr


def test_a_file_that_disagrees_is_not_written(predictor, tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("the file before")
    copied = export.without_fft(predictor.segmenter)
    copied.encoder.spectral_prompt.filter.mul_(0.5)
    monkeypatch.setattr(export, "without_fft", lambda segmenter: copied)
    with pytest.raises(UserError, match="model.pt2: not written, since it disagrees with predict"):
        export_model(predictor, tmp_path / "model.pt2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "the file before")]


def test_only_ties_may_have_other_labels():
    scores = np.zeros((1, 3, 1, 3), np.float32)
    scores[0, :, 0] = [[0.8, 0.8, 0.8], [0.8 - 1e-5, 0.7, 0.8], [0.1, 0.1, 0.8]]
    labels = scores.argmax(1)
    assert agreement(scores, np.array([[[1, 0, 2]]]), scores, labels) == Agreement(0, 2, 0)
    assert agreement(scores, np.array([[[0, 1, 0]]]), scores, labels) == Agreement(0, 0, 1)
    assert not agreement(scores * 1.001, labels, scores, labels).holds
    assert not agreement(np.full_like(scores, np.nan), labels, scores, labels).holds


REFUSED = {
    "an unknown format": ({"format": "tflite"}, "model.onnx", "'tflite' is unknown; use onnx or torch-export"),
    "another suffix": ({}, "model.bin", "does not end in .onnx or .pt2"),
    "the other suffix": ({"format": "torch-export"}, "model.onnx", "does not end in .pt2"),
    "a folder": ({}, "", "is a folder"),
    "a file as a folder": ({}, "file/model.onnx", "cannot be written"),
    "no classes": ({"classes": []}, "model.onnx", "no names"),
    "a name twice": ({"classes": ["cat", "cat"]}, "model.onnx", "'cat' is named twice"),
    "a bias without names": ({"open_vocabulary": True, "seen_bias": 0.01}, "model.onnx", "seen_bias: an open"),
    "a wrong bias": ({"seen_bias": 3}, "model.onnx", "seen_bias: 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_the_model_is_traced(predictor, tmp_path, case, monkeypatch):
    monkeypatch.setattr(export, "trace", lambda *_: pytest.fail("time was spent"))
    options, name, message = REFUSED[case]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        export_model(predictor, tmp_path / name, **options)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("package", FORMATS["onnx"].packages)
def test_a_missing_extra_is_named(predictor, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install \"sptseg\[export\]\""):
        export_model(predictor, tmp_path / "model.onnx")


def test_a_model_too_large_for_onnx_is_refused(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_LIMIT", 10_000)
    with pytest.raises(UserError, match="2 GiB.*torch-export"):
        export_model(predictor, tmp_path / "model.onnx")


def test_a_model_that_pytorch_cannot_convert_is_refused(predictor, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no translation")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=rf"format onnx: PyTorch {re.escape(torch.__version__)} cannot.*torch-export"):
        export_model(predictor, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_command_exports_a_shipped_model(tmp_path, capsys):
    names = Path(tmp_path, "names.txt")
    names.write_text("red heart\ngreen cat\n")
    out = tmp_path / "new" / "model.pt2"
    arguments = ["--classes-file", names, "--out", out, "--format", "torch-export", "--open-vocabulary", "--quiet"]
    assert main(["export", "zegclip-glyphs", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"done: {out}" and "labels identical" in printed[0] and len(printed) == 4
    assert {path.name for path in out.parent.iterdir()} == {"model.pt2", "model.npy"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 of another project"])
def test_command_refuses_a_model_of_another_project(tmp_path, capsys, content):
    (tmp_path / "model.pth").write_bytes(content)
    assert main(["export", str(tmp_path / "model.pth"), "--out", str(tmp_path / "model.onnx")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("sptseg: ") and printed.err.count("\n") == 1
    assert "model.pth" in printed.err and not (tmp_path / "model.onnx").exists()
