"""The web page: its answers, its server, and a reader with a real browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

import sptseg
from devtools import Browser, find_browser
from sptseg.app.server import MAX_UPLOAD, serve, serve_until_stopped
from sptseg.app.web import FAINT, OPACITY, STRONG, Answers, draw_layers, page_head
from sptseg.cli import main
from sptseg.core import asset_path
from sptseg.inference.images import example_images
from sptseg.inference.results import MAX_NAMES, Result
from sync import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["red heart", "green cat", "yellow knight"]


@pytest.fixture(scope="module")
def model():
    return sptseg.load("spt-seg-glyphs", device="cpu")


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def answers_at(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def address(model):
    with serve(model, port=free_port()) as address:
        yield address


@pytest.fixture
def answers(model, tmp_path):
    return Answers(model, tmp_path)


def sentence(work, *arguments):
    """What the page shows instead of an answer."""
    with pytest.raises(gr.Error) as caught:
        work(*arguments)
    return caught.value.message


# Answers


def test_layers_are_the_labels():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) // 2
    labels[0, 0] = 255
    result = Result(labels, tuple(f"class {n}" for n in range(9)), torch.zeros(3, 3, 4, dtype=torch.uint8))
    drawn = draw_layers(result)
    assert len(drawn.layers) == 6 and drawn.palette.keys() == {entry for _, entry in drawn.layers}
    assert {layer.max() for layer, _ in drawn.layers} == {OPACITY}
    assert drawn.layers[0][1] == "class 1 17%" and drawn.layers[-1][1] == "class 0 8%", "the largest first"
    covered = sum(layer > 0 for layer, _ in drawn.layers)
    assert covered.max() == 1 and 1 - covered.mean() == pytest.approx(1 / 12, abs=0.01), "no layer where no class fits"
    strong = {entry: layer.max() for layer, entry in draw_layers(result, "class 3").layers}
    assert strong.pop("class 3 17%") == STRONG and set(strong.values()) == {FAINT}
    assert {layer.max() for layer, _ in draw_layers(result, "class 8").layers} == {OPACITY}, "a class that is not there"


def test_the_legend_is_bounded_and_names_small_shares():
    labels = np.zeros((20, 20), np.uint8)
    labels[0] = np.arange(20)
    labels[1] = np.arange(20, 40)
    labels[2] = np.arange(40, 60)
    result = Result(labels, tuple(f"class {n}" for n in range(60)), torch.zeros(3, 20, 20, dtype=torch.uint8))
    entries = [entry for _, entry in draw_layers(result).layers]
    assert len(entries) == MAX_NAMES and entries[1] == "class 1 <1%"


def test_the_page_labels_as_predict_does(answers, model):
    path = example_images()["scene-4.png"]
    encoded = answers.encode(str(path))
    result, layers, classes, scores, *files = answers.label(
        encoded, "red heart, green cat\nyellow knight", 0.2, 0.1, ""
    )
    expected = model.predict(path, NAMES, threshold=0.2, seen_bias=0.1, scores=True)
    assert (result.labels == expected.labels).all() and result.classes == expected.classes
    assert layers["label"] == "scene-4, 96×96 pixels" and scores["visible"] is False
    assert classes["choices"] == [("none", ""), *NAMES] and classes["value"] == ""
    assert [file["interactive"] for file in files] == [False] * 3
    mask, overlay, legend = (Path(file["value"]) for file in answers.write(result))
    assert mask.name == "scene-4.png" and (np.asarray(Image.open(mask)) == expected.labels).all()
    assert (np.asarray(Image.open(overlay)) == np.asarray(expected.overlay())).all()
    assert json.loads(legend.read_text())["classes"] == NAMES


def test_names_and_options_do_not_encode_again(answers, monkeypatch):
    encoded = answers.encode_example(3)
    monkeypatch.setattr(type(answers.model), "encode", None)
    result, layers, *_ = answers.label(encoded, "red heart, green cat", 1, 0, "")
    assert (result.labels == 255).all() and layers["label"].endswith("no pixel reaches the threshold")


def test_a_click_chooses_a_class_and_the_next_one_none(answers):
    result, *_ = answers.label(answers.encode_example(3), ",".join(NAMES), 0, 0, "")
    for index, name in enumerate(result.shares()):
        event = SimpleNamespace(index=index)
        assert answers.choose(result, "", event) == name and answers.choose(result, name, event) == ""
    layers, classes, scores = answers.show(result, "green cat")
    assert scores["visible"] and "green cat" in scores["label"] and classes["value"] == "green cat"
    assert (np.asarray(scores["value"]) == np.asarray(result.score_image("green cat"))).all()
    assert answers.show(result, "a class of the list before")[1]["value"] == ""


@pytest.mark.parametrize(
    ("names", "expected"),
    {
        "": "no names",
        " , ,\n": "no names",
        "red heart, Red  heart, red heart": "named twice",
        "purple cow": "cow",
        "<img src=x onerror=alert(1)>": "&lt;img",
    }.items(),
)
def test_names_that_cannot_be_used_give_a_sentence(answers, names, expected):
    shown = sentence(answers.label, answers.encode_example(), names, 0, 0, "")
    assert expected in shown and "<" not in shown


def test_uploads_that_cannot_be_used_give_a_sentence(answers, tmp_path):
    broken = {
        "empty.png": b"",
        "text.png": b"no image",
        "cut.png": asset_path("examples/scene-1.png").read_bytes()[:999],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        shown = sentence(answers.encode, str(tmp_path / name))
        assert shown.startswith(f"{name}: ") and str(tmp_path) not in shown
    Image.new("1", (30_000, 20_000)).save(tmp_path / "huge.png")
    assert "600,000,000 pixels; the limit is" in sentence(answers.encode, str(tmp_path / "huge.png"))


def test_forgotten_images_give_a_sentence(answers):
    assert "upload one" in sentence(answers.label, None, "red heart", 0, 0, "")
    assert "upload one" in sentence(answers.show, None, "") and "upload one" in sentence(answers.choose, None, "", None)


def test_the_head_is_escaped(model):
    named = SimpleNamespace(notes=model.notes, source={"name": "<script>"})
    assert "&lt;script&gt;, spt-seg" in page_head(named).replace("</b>", "") and "<script" not in page_head(named)


# Server


def get(address):
    """HTTP status and content of an address."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post(address, content, kind="application/json"):
    request = urllib.request.Request(address, content, {"Content-Type": kind})
    return get(request)


def test_no_file_of_the_computer_is_reachable(address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    paths = [
        "/etc/passwd",
        ROOT / "README.md",
        ROOT / "pyproject.toml",
        asset_path("examples/scene-1.png"),
        "README.md",
    ]
    paths += [tmp_path / "secret.txt", "..%2f..%2f..%2fetc%2fpasswd", "/proc/self/environ", ROOT / ".git/config"]
    for path in paths:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
            status, content = get(f"{address}/{route}{path}")
            assert status in (403, 404, 405) and b"root:" not in content and b"sptseg" not in content, (route, path)


def ask(address, function, data):
    """What the server answers to a call as a page makes it."""
    call = {"data": data, "fn_index": function, "session_hash": "a-reader"}
    status, content = post(f"{address}/gradio_api/queue/join", json.dumps(call).encode())
    if status != 200:
        return content.decode()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=a-reader", timeout=30) as events:
        return events.read().decode()


def test_a_file_that_was_not_uploaded_is_not_read(address):
    config = json.loads(get(f"{address}/config")[1])
    [upload] = [one["id"] for one in config["components"] if one["type"] == "file"]
    [function] = [one["id"] for one in config["dependencies"] if one["inputs"] == [upload]]
    for path in ("/etc/passwd", str(ROOT / "figures/demo.png")):
        answer = ask(address, function, [{"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert '"success":false' in answer.replace(" ", "") and "root:" not in answer


def test_uploads_are_bounded(address):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    kind = "multipart/form-data; boundary=x"
    size = int(MAX_UPLOAD.removesuffix("mb")) * 10**6
    assert post(f"{address}/gradio_api/upload", head + b"a" * 1000 + b"\r\n--x--\r\n", kind)[0] == 200
    assert post(f"{address}/gradio_api/upload", head + b"a" * int(1.1 * size) + b"\r\n--x--\r\n", kind)[0] == 413


def test_the_page_keeps_to_itself(address):
    config = json.loads(get(f"{address}/config")[1])
    assert address.startswith("http://127.0.0.1:")
    assert not config["analytics_enabled"] and not config["footer_links"]
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])
    assert json.loads(get(f"{address}/gradio_api/info")[1])["named_endpoints"] == {}
    status, page = get(address)
    assert status == 200 and b"fonts.googleapis" not in page and b'<script src="http' not in page


def test_nothing_is_left_behind(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = dict(os.environ)
    with serve(model, port=free_port()) as address:
        assert get(f"{address}/gradio_api/file=/etc/passwd")[0] == 403
        assert any(tmp_path.glob("sptseg-*/*")), "the examples lie there"
    assert dict(os.environ) == environment and not list(tmp_path.iterdir())


# Command


def refusal(capsys, *arguments):
    assert main(["app", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert not shown.out
    return line


def test_wrong_addresses_are_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("sptseg.inference.predictor.load", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refusal(capsys, "spt-seg-glyphs", "--port", port)
        assert line == f"sptseg: --port: {port} is taken on 127.0.0.1; choose another one, such as --port {port + 1}"
    assert "65535" in refusal(capsys, "spt-seg-glyphs", "--port", 0)
    assert "0.0.0.0" in refusal(capsys, "spt-seg-glyphs", "--port", port, "--host", "192.0.2.1")
    assert "not an address" in refusal(capsys, "spt-seg-glyphs", "--port", port, "--host", "no.such.host.invalid")


def test_a_missing_extra_and_an_unknown_model_are_named(capsys, monkeypatch):
    assert "did you mean 'spt-seg-glyphs'" in refusal(capsys, "spt-seg-glyph", "--port", free_port())
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refusal(capsys, "spt-seg-glyphs", "--port", free_port())
    assert "'gradio' is missing" in line and 'pip install "sptseg[app]"' in line


def test_the_page_stops_with_the_process(model, capsys):
    before, port, printed = signal.getsignal(signal.SIGTERM), free_port(), []

    def stop():  # as soon as the address is printed
        while not "".join(printed).endswith("\n"):
            time.sleep(0.1)
            printed.append(capsys.readouterr().out)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        serve_until_stopped(model, "127.0.0.1", port)
    finally:
        stopper.join()
        signal.signal(signal.SIGTERM, before)
    assert "".join(printed) == f"spt-seg-glyphs: http://127.0.0.1:{port} (Ctrl-C stops the page)\n"


@pytest.mark.slow
def test_ctrl_c_stops_the_page(tmp_path):
    port, environment = free_port(), {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sptseg.cli", "app", "zegclip-glyphs", "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell lets its background jobs ignore Ctrl-C
    process = subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)
    try:
        assert process.stdout.readline() == f"zegclip-glyphs: http://127.0.0.1:{port} (Ctrl-C stops the page)\n"
        assert get(f"http://127.0.0.1:{port}")[0] == 200
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and rest == "" and errors == ""
    assert not list(tmp_path.glob("sptseg-*"))
    assert not answers_at(port)


# Browser


@pytest.fixture
def browser(tmp_path):
    if find_browser() is None:
        pytest.skip("needs Chromium or Chrome, which is not installed")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def type_names(browser, text):
    browser.run("document.querySelector('textarea').focus(), document.querySelector('textarea').select()")
    browser("Input.insertText", text=text)
    browser.run("[...document.querySelectorAll('button')].find(one => one.innerText == 'Label').click()")


LEGEND = "[...document.querySelectorAll('#layers .legend-item')].map(one => one.innerText.trim())"
LABELLED = "document.querySelector('#layers label').innerText.trim()"


def test_a_reader_uploads_an_image_and_downloads_its_mask(browser, address, model, tmp_path):
    scenes = [Image.open(example_images()[name]).convert("RGB") for name in ("scene-4.png", "scene-1.png")]
    Image.fromarray(np.concatenate(scenes, axis=1)[:, :150]).save(tmp_path / "my photo.png")
    names = ["red heart", "green cat", "blue umbrella", "purple star", "yellow heart"]
    expected = model.predict(tmp_path / "my photo.png", names)

    browser("Page.navigate", url=address)
    browser.wait(f"{LEGEND}.length > 0", "the first example")
    assert browser.run(LABELLED) == "scene-1, 96×96 pixels"
    browser.upload("input[type=file]", tmp_path / "my photo.png")
    browser.wait(f"{LABELLED} == 'my photo, 150×96 pixels'", "the upload")
    type_names(browser, ", ".join(names))
    browser.wait(
        f"{LEGEND}.join() == {json.dumps(','.join(entry for _, entry in draw_layers(expected).layers))}", "labels"
    )
    assert download(browser, "Mask (PNG)", tmp_path / "downloads", expected)

    browser.run("document.querySelectorAll('#layers .legend-item')[1].click()")
    chosen = list(expected.shares())[1]
    browser.wait(
        f"!!document.querySelector('#scores img') && document.querySelector('#scores').innerText.includes({chosen!r})",
        "scores",
    )
    time.sleep(1)
    shot = browser.screenshot(Path(os.environ.get("SPTSEG_SCREENSHOT", tmp_path / "page.png")))
    assert np.asarray(Image.open(shot).convert("L")).std() > 20

    type_names(browser, "red heart, red heart")
    browser.wait("document.body.innerText.includes(\"'red heart' is named twice; name each class once\")", "the error")
    assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []


def download(browser, button, folder, expected):
    """Click a button, and compare the file with the expected labels."""
    folder.mkdir()
    browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    find = f"[...document.querySelectorAll('button')].find(one => one.innerText == {button!r})"
    browser.wait(f"!{find}.disabled", "the button")
    browser.run(f"{find}.click()")
    browser.wait(lambda: list(folder.glob("*.png")), "the download")
    [path] = folder.glob("*.png")
    mask = Image.open(path)
    assert path.name == "my photo.png" and mask.mode == "P"
    return (np.asarray(mask) == expected.labels).all()
