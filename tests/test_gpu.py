"""The measurements of `make gpu`, and tests that need a GPU themselves (`-m gpu`)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sptseg.core import UserError, git_commit
from sptseg.inference.windows import labels_from_masks, window_places
from sptseg.models.segmenter import METHODS, build_segmenter
from sptseg.paper import gpu
from sptseg.recipe import load_recipe
from sptseg.releases.reference import check_reference
from sptseg.training.loop import train
from sptseg.training.losses import segmentation_loss

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).parent / "reference"
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


@pytest.fixture
def parts(monkeypatch):
    """Three harmless parts: the second one fails, the third one counts its runs."""

    def use(**commands):
        monkeypatch.setattr(gpu, "read_yaml", lambda path: {n: {"title": n, "run": c} for n, c in commands.items()})

    use(good="echo fine", bad="echo broken; exit 3", counted="echo once >> {out}/count")
    return use


def run(out, *names, name="card"):
    return gpu.run_parts(out, names, device=lambda: name)


def test_a_failing_part_does_not_stop_the_others_and_is_repeated(tmp_path, parts, monkeypatch):
    monkeypatch.setenv("SPTSEG_COMMIT", "abc1234")
    assert run(tmp_path) == ["bad"]
    record = json.loads((tmp_path / "bad.part.json").read_text())
    assert record["status"] == 3 and "broken" in record["output"] and record["gpu"] == "card"
    assert record["commit"] == "abc1234"
    parts(good="echo fine", bad="echo broken; exit 3", counted="echo once >> {out}/count")
    assert run(tmp_path) == ["bad"]
    assert (tmp_path / "count").read_text() == "once\n"


@pytest.mark.parametrize("change", ["gpu", "commit", "command"])
def test_another_gpu_commit_or_command_is_measured_anew(tmp_path, parts, monkeypatch, change):
    monkeypatch.setenv("SPTSEG_COMMIT", "abc1234")
    run(tmp_path, "counted")
    if change == "commit":
        monkeypatch.setenv("SPTSEG_COMMIT", "abc1235")
    if change == "command":
        parts(counted="echo once  >> {out}/count")
    run(tmp_path, "counted", name="another card" if change == "gpu" else "card")
    assert (tmp_path / "count").read_text() == "once\n" * 2


def test_the_time_limit_ends_the_processes_of_a_part(tmp_path, parts):
    parts(slow="(sleep 30; touch {out}/late) & sleep 30")
    start = time.monotonic()
    assert gpu.run_parts(tmp_path, limit=1, device=lambda: "card") == ["slow"]
    assert time.monotonic() - start < 15
    assert json.loads((tmp_path / "slow.part.json").read_text())["status"] == 124


def test_without_a_gpu_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "finds no GPU" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_listed_parts_name_files_and_recipes_that_exist():
    for part in gpu.read_parts():
        words = part.run.format(python="python", out="out").split()
        for word in words:
            if word.startswith(("nbs/", "tests")):
                assert (ROOT / word).exists(), f"{part.name}: {word}"
            if word.startswith(("demo/", "complexity/")):
                load_recipe(word)
    with pytest.raises(UserError, match="unknown part 'bench'.*environment"):
        gpu.read_parts(["bench"])


def test_the_commit_of_an_archive_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SPTSEG_COMMIT", "0123abc")
    assert git_commit() == "0123abc"


def small_case(device):
    """A small model in float32 with images, class embeddings and labels."""
    from sptseg.models.clip import load_clip

    recipe = load_recipe("demo/spt-seg")
    torch.manual_seed(0)
    clip = load_clip(recipe.clip)
    model = build_segmenter(clip.visual, METHODS["spt-seg"].model_copy(update={"image_size": recipe.image_size}))
    images = torch.randn(2, 3, recipe.image_size, recipe.image_size)
    text = torch.nn.functional.normalize(torch.randn(5, clip.visual.output_dim), dim=-1)
    label = torch.randint(5, (2, recipe.image_size, recipe.image_size))
    return model.to(device).eval(), images.to(device), text.to(device), label.to(device)


@on_gpu
def test_masks_losses_and_gradients_equal_those_of_the_cpu():
    results = {}
    for device in ("cpu", "cuda"):
        model, images, text, label = small_case(device)
        masks = model(images, text)
        loss = segmentation_loss(masks, label)["loss"]
        loss.backward()
        gradients = {name: tensor.grad.cpu() for name, tensor in model.trained_tensors().items()}
        results[device] = masks.detach().cpu(), loss.detach().cpu(), gradients
    (masks, loss, gradients), (masks_gpu, loss_gpu, gradients_gpu) = results["cpu"], results["cuda"]
    assert (masks - masks_gpu).abs().max() <= 1e-4 * masks.abs().max()
    assert (loss - loss_gpu).abs() <= 1e-5 * loss.abs()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - gradients_gpu[name]).abs().max() <= 1e-3 * largest, name


@on_gpu
def test_labels_equal_those_of_the_cpu():
    masks = torch.randn(1, 1, 20, 12, 12)
    places = window_places((96, 96), (96, 96), (96, 96))
    cpu, cuda = (labels_from_masks(masks.to(d), places, (96, 96), (150, 200)).cpu() for d in ("cpu", "cuda"))
    assert (cpu != cuda).float().mean() < 1e-3  # ties of rounded scores


@on_gpu
def test_the_reference_vectors_are_reproduced():
    lines = []
    assert check_reference(REFERENCE, device="cuda", report=lines.append), [line for line in lines if "FAIL" in line]


def smoke(**keys):
    return load_recipe("demo/smoke", iterations=6, eval_every=6, checkpoint_every=2, **keys)


@on_gpu
def test_deterministic_training_repeats_bit_for_bit(tmp_path):
    first, again = (train(smoke(deterministic=True), tmp_path / name, progress=False) for name in "ab")
    assert first["device"].startswith("cuda") and first["metrics"] == again["metrics"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@on_gpu
@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    settings = ["iterations=40", "eval_every=40", "checkpoint_every=5", "deterministic=true"]
    command = [sys.executable, "-m", "sptseg.cli", "train", "demo/smoke", *settings, "--out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("**/*000010*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=True)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@on_gpu
def test_bfloat16_training_learns_and_differs_from_float32(tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        results = train(smoke(mixed_precision=precision), tmp_path / precision, progress=False)
        losses[precision] = [row["loss"] for row in results["history"]["train"]]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in losses.values())
    assert losses["no"] != losses["bf16"]
    assert losses["bf16"][0] == pytest.approx(losses["no"][0], rel=0.05)


def test_the_next_batch_is_moved_before_the_current_one_is_used(monkeypatch):
    """The order of events on a GPU, recorded with streams that do nothing."""
    from contextlib import nullcontext

    from sptseg.training import batches

    events = []

    class Stream:
        def __init__(self, *arguments):
            pass

        def wait_stream(self, stream):
            events.append("wait")

    def moved(batch, device, num_classes):
        events.append(f"move {batch}")
        return batches.Batch(*(type("Part", (), {"record_stream": lambda self, stream: None})(),) * 2, batch)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(batches, "to_device", moved)
    for batch in batches.device_batches(range(3), torch.device("cuda"), 15):
        events.append(f"use {batch.present}")
    assert events == ["move 0", "wait", "move 1", "use 0", "wait", "move 2", "use 1", "wait", "use 2"]


@on_gpu
def test_batches_of_a_gpu_are_those_of_the_cpu():
    from sptseg.training.batches import device_batches

    loader = [(torch.randn(2, 3, 8, 8), torch.randint(5, (2, 8, 8), dtype=torch.uint8), ["a", "b"]) for _ in range(4)]
    pairs = zip(*(device_batches(loader, torch.device(name), 5) for name in ("cpu", "cuda")), strict=True)
    for cpu, cuda in pairs:
        assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, cuda, strict=True)) and cuda.images.is_cuda
