"""Steps of the data pipeline on a GPU, the processes that load its images, and the warning that it waits."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sptseg
from sptseg.core import IGNORE, UserError, asset_path
from sptseg.data.benchmarks import glyph_benchmark
from sptseg.data.colours import change_colours, draw_colours
from sptseg.data.label_sets import LabelSet, label_to_train_id
from sptseg.data.on_device import RawData, draws_of, finish_images, hsv_of
from sptseg.data.transforms import IMAGENET_STD, Sample, SegmentationData, TrainTransform, sample_generator
from sptseg.models import device as devices
from sptseg.models.device import ENOUGH_WORKERS, check_precision, loader_workers, usable_cores
from sptseg.recipe import Recipe
from sptseg.training.batches import LoaderClock, device_batches, slow_loader_warning, train_loader

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEUTRAL = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
RECIPE = Recipe(dataset="glyphs-20", image_size=80, iterations=3, batch_size=4, train_images=8, val_images=1)


def noise(*size, seed=0):
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pairs(width, count=48):
    """Noise with drawn colours, by a batch in PyTorch and one by one with OpenCV."""
    images, drawn = noise(count, 3, 40, width), [draw_colours(sample_generator(0, 1, index)) for index in range(count)]
    padded = torch.nn.functional.pad(images, (0, 0, 0, width - 40)) if width > 40 else images
    draws = torch.stack([draws_of((40, width), one) for one in drawn])
    expected = torch.stack([change_colours(one, colours) for one, colours in zip(images, drawn, strict=True)])
    return finish_images(padded, draws, **NEUTRAL)[:, :, :40], expected


@pytest.mark.parametrize("width", [40, 64, 71, 128, 200])
def test_colours_are_those_of_opencv_at_every_width(width):
    found, expected = pairs(width)
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-4, "processors without fused products round a few values otherwise"


def test_hsv_holds_what_the_formula_says():
    primaries = torch.tensor([[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]], dtype=torch.uint8)
    hue, saturation, value = hsv_of(primaries[:, :, None, None])
    assert hue.flatten().tolist() == [0, 30, 60, 120, 0]
    assert saturation.flatten().tolist() == [255, 255, 255, 255, 0]
    assert value.flatten().tolist() == [255, 255, 255, 255, 90]


@pytest.mark.parametrize("photometric", [False, True])
def test_a_raw_crop_becomes_the_plain_one(photometric):
    samples = [Sample(noise(3, 70, 90, seed=n), noise(70, 90, seed=n) % 3, str(n)) for n in range(4)]
    lookup = label_to_train_id(LabelSet("three", ("a", "b", "c")), "supervised")
    transform = TrainTransform(crop_size=64, image_scale=(64, 256), photometric=photometric)
    plain, raw = (kind(samples, lookup=lookup, transform=transform, seed=3) for kind in (SegmentationData, RawData))
    keys = [(epoch, index) for epoch in range(10) for index in range(4)]
    some = [raw[key] for key in keys]
    found = finish_images(torch.stack([one.image for one in some]), torch.stack([one.draws for one in some]))
    for key, one, image in zip(keys, some, found, strict=True):
        expected = plain[key]
        assert torch.equal(one.mask, expected.mask) and one.name == expected.name
        assert ((image - expected.image).abs() * torch.tensor(IMAGENET_STD)[:, None, None]).max() < 1.01
        assert (image[:, expected.mask == IGNORE] == expected.image[:, expected.mask == IGNORE]).all(), "padding is 0"


def test_the_steps_run_on_a_gpu_without_waiting_for_it():
    """Fake tensors of a GPU raise an error wherever the CPU would need a value."""
    with FakeTensorMode():
        images, draws = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="cuda"), torch.empty(2, 7).double()
        finished = finish_images(images, draws)
    assert finished.device.type == "cuda" and finished.shape == (2, 3, 64, 64) and finished.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_those_of_the_cpu_with_any_number_of_workers(workers):
    benchmark = glyph_benchmark("glyphs-20", size=80, train_images=8, val_images=1)
    recipe = RECIPE.model_copy(update={"workers": workers})
    plain, raw = (train_loader(benchmark, recipe, "inductive", device) for device in (CPU, CUDA))
    assert next(iter(raw)).image.dtype == torch.uint8
    for one, other in zip(*(device_batches(loader, CPU, 15) for loader in (plain, raw)), strict=True):
        assert torch.equal(one.label, other.label) and torch.equal(one.present, other.present)
        assert (one.images - other.images).abs().max() * max(IMAGENET_STD) < 1.01


def test_workers_follow_the_device_and_the_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(40), raising=False)
    assert loader_workers(None, CPU) == 0 and loader_workers(None, CUDA) == ENOUGH_WORKERS
    assert loader_workers(3, CUDA) == loader_workers(3, CPU) == 3 and loader_workers(0, CUDA) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert usable_cores() == loader_workers(None, CUDA) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert loader_workers(None, CUDA) == 1


def clock(waiting, stepping, monkeypatch):
    """A clock after ten iterations of known seconds."""
    now = [0.0]
    monkeypatch.setattr("sptseg.training.batches.time.perf_counter", lambda: now[0])
    found = LoaderClock(CPU, window=range(2, 10))

    def load():
        for _ in range(10):
            now[0] += waiting
            yield None

    for _ in found.waiting(load()):
        with found.step():
            now[0] += stepping
    return found


def test_waiting_for_images_is_reported_with_both_rates(monkeypatch):
    monkeypatch.setattr("sptseg.training.batches.usable_cores", lambda: 16)
    slow = clock(0.3, 0.1, monkeypatch)
    assert slow.seconds() == pytest.approx((0.4, 0.1))
    assert slow_loader_warning(slow, 16, workers=4) == (
        "the GPU waits for images: training reaches 40 images/s, and the model alone 160;"
        " raise workers (4 load images, 16 cores are here)"
    )
    assert "all 16 cores load images; use more cores" in slow_loader_warning(slow, 16, workers=16)
    with slow.step():
        pass
    assert slow_loader_warning(slow, 16, workers=4) is None, "it is said once"


def test_a_loader_that_keeps_up_is_not_reported(monkeypatch):
    fast = clock(0.005, 0.1, monkeypatch)
    assert fast.done == fast.window.stop and slow_loader_warning(fast, 16, workers=4) is None


def test_bfloat16_is_refused_or_warned_of_where_it_cannot_pay(monkeypatch, recwarn):
    with pytest.raises(UserError, match="mixed_precision: 'fp16' is unknown; use no or bf16"):
        check_precision(CPU, "fp16")
    monkeypatch.setattr(devices, "bf16_seconds", lambda: (1.0, 0.6))
    check_precision(CPU, "bf16")
    monkeypatch.setattr(devices, "bf16_seconds", lambda: (1.0, 2.5))
    check_precision(CUDA, "bf16")
    check_precision(CPU, "no")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="bf16 takes 2.5 times as long as float32 on this CPU; use no"):
        check_precision(CPU, "bf16")


@pytest.mark.filterwarnings("ignore:mixed_precision")
def test_labels_in_bfloat16_are_nearly_those_in_float32():
    image = asset_path("examples") / "scene-1.png"
    plain, half = (sptseg.load("spt-seg-glyphs", "cpu", mixed_precision=kind) for kind in ("no", "bf16"))
    features = half.encode(image).features.encoded[0]
    assert features.dtype == torch.bfloat16 and plain.encode(image).features.encoded[0].dtype == torch.float32
    results = [model.predict(image, scores=True) for model in (plain, half)]
    assert (results[0].labels != results[1].labels).mean() < 0.05
    assert results[1].scores.dtype == results[0].scores.dtype
