"""Colour changes of training images: OpenCV's arithmetic, mmsegmentation's order, and the same draws everywhere."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sptseg.data.colours import (
    Colours,
    change_colours,
    draw_colours,
    linear_table,
    scale_and_shift,
    scale_saturation,
    shift_hue,
    to_array,
    to_tensor,
)

MMCV = load_file(Path(__file__).parent / "reference_mmcv/pipeline.safetensors")


def drawn_colours(number):
    brightness, contrast, saturation, hue = (None if draw != draw else draw for draw in MMCV["draws"][number].tolist())
    return Colours(brightness, contrast, number % 2 == 0, saturation, None if hue is None else int(hue))


def seeded(number):
    return torch.Generator().manual_seed(number)


def noise(height=64, width=64, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=seeded(seed), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["drawn", "noise"])
@pytest.mark.parametrize("number", range(len(MMCV["draws"])))
def test_a_distortion_gives_the_bytes_of_mmsegmentation(name, number):
    changed = change_colours(to_tensor(MMCV[name].numpy()), drawn_colours(number))
    assert torch.equal(changed, to_tensor(MMCV[f"{name}.colours{number}"].numpy()))


def test_tables_hold_what_numpy_computes_pixel_by_pixel():
    for scale, shift in [(1.0, -31.7), (0.5317, 0.0), (1.4999, 0.0), (1.0, 17.0)]:
        plain = np.clip(np.arange(256, dtype=np.float32) * scale + shift, 0, 255).astype(np.uint8)
        assert np.array_equal(linear_table(scale, shift), plain)


def test_the_draws_are_made_in_their_fixed_order():
    compared = 0
    for index in range(200):
        if (drawn := draw_colours(seeded(index))).hue is not None:
            continue  # a whole number comes from the generator in another way
        numbers = iter(torch.rand(9, generator=seeded(index), dtype=torch.float64).tolist())
        shift = -32 + 64 * next(numbers) if next(numbers) < 0.5 else None
        first = next(numbers) < 0.5
        factor = 0.5 + next(numbers) if first and next(numbers) < 0.5 else None
        colour = 0.5 + next(numbers) if next(numbers) < 0.5 else None
        assert next(numbers) >= 0.5, "hue is left out"
        if not first:
            factor = 0.5 + next(numbers) if next(numbers) < 0.5 else None
        assert drawn == Colours(shift, factor, first, colour, None)
        compared += 1
    assert compared > 50


def test_all_sixteen_combinations_are_drawn_and_values_stay_in_range():
    drawn = [draw_colours(seeded(index)) for index in range(600)]
    assert len({tuple(part is None for part in (*one[:2], *one[3:])) for one in drawn}) == 16
    assert {one.hue for one in drawn} == {None, *range(-18, 18)}
    assert all(one.brightness is None or -32 <= one.brightness < 32 for one in drawn)
    assert all(part is None or 0.5 <= part < 1.5 for one in drawn for part in (one.contrast, one.saturation))


def test_hue_shift_by_nothing_or_a_full_circle_keeps_colours():
    image = noise(200, 200)
    assert (shift_hue(image, 0).int() - image.int()).abs().max() <= 7  # bytes of HSV are coarser than RGB
    assert torch.equal(shift_hue(image, 0), shift_hue(image, 180))
    pure = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90], [0, 0, 0]], dtype=torch.uint8).T[:, None]
    assert torch.equal(shift_hue(pure, 0), pure)
    assert torch.equal(shift_hue(pure, 60)[:, :, :3], pure[:, :, [1, 2, 0]]), "60 half degrees: red to green to blue"


def test_colour_changes_clip_and_drop_fractions():
    values = torch.tensor([0, 3, 200, 255], dtype=torch.uint8).expand(3, 1, 4)
    assert scale_and_shift(values, scale=1.5)[0, 0].tolist() == [0, 4, 255, 255]
    assert scale_and_shift(values, shift=-10.5)[0, 0].tolist() == [0, 0, 189, 244]
    grey = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(scale_saturation(grey, 1.4), grey)


def test_inputs_are_never_changed():
    image = to_tensor(np.ascontiguousarray(to_array(noise())))
    before = image.clone()
    for index in range(20):
        change_colours(image, draw_colours(seeded(index)))
    assert torch.equal(image, before)


def test_opencv_starts_no_threads():
    assert cv2.getNumThreads() == 1


def test_colour_changes_happen_as_often_and_as_far_as_they_should():
    image = torch.full((3, 1, 1), 100, dtype=torch.uint8)  # grey: saturation and hue have no effect
    values = [change_colours(image, draw_colours(seeded(i)))[0, 0, 0].item() for i in range(2000)]
    unchanged = sum(value == 100 for value in values) / 2000
    assert 0.21 < unchanged < 0.30, "brightness and contrast are both left out a quarter of the time"
    assert 34 <= min(values) and max(values) <= 197 and min(values) < 45 and max(values) > 180
