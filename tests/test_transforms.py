"""The data pipeline: sizes, crops, colours, order of the steps, and where its random numbers come from."""

import colorsys

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from sptseg.core import IGNORE, UNSEEN, UserError
from sptseg.data.label_sets import LabelSet, label_to_train_id
from sptseg.data.transforms import (
    IMAGENET_MEAN,
    EvalTransform,
    Sample,
    SegmentationData,
    TrainTransform,
    hsv_to_rgb,
    is_varied,
    normalise,
    pad_to,
    photometric_distortion,
    random_box,
    random_size,
    rescaled_size,
    resize_image,
    resize_mask,
    rgb_to_hsv,
    sample_crop_box,
    sample_generator,
    scale_and_shift,
    scale_saturation,
    shift_hue,
)

LABELS = LabelSet("five", ("a", "b", "c", "d", "e"), unseen=(1, 3))


def random_sample(height=60, width=80, seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    blocks = torch.randint(0, classes, (-(-height // 8), -(-width // 8)), generator=generator, dtype=torch.uint8)
    mask = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].contiguous()
    return Sample(image, mask, f"sample {seed}")


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((375, 500), (512, 2048), (512, 683)),  # 682.67 rounds up
        ((500, 333), (512, 2048), (769, 512)),  # 768.77
        ((427, 640), (512, 2048), (512, 767)),  # 767.40 rounds down
        ((100, 500), (512, 2048), (410, 2048)),  # the long side binds: 409.6
        ((2, 5), (3, 100), (3, 8)),  # 7.5: half goes up, not to even
        ((96, 96), (96, 384), (96, 96)),
    ],
)
def test_sizes_are_rounded_half_up(size, scale, expected):
    assert rescaled_size(size, scale) == expected


def test_random_sizes_stay_in_range_and_keep_the_aspect():
    sizes = [random_size((375, 500), (512, 2048), (0.5, 2.0), sample_generator(0, 0, i)) for i in range(300)]
    shorts = [min(size) for size in sizes]
    assert min(shorts) >= 256 and max(shorts) <= 1024 and min(shorts) < 280 and max(shorts) > 1000
    assert all(abs(width / height - 500 / 375) < 0.005 for height, width in sizes)


def test_a_fixed_ratio_gives_a_fixed_size():
    assert {random_size((96, 96), (96, 384), (1, 1), sample_generator(0, 0, i)) for i in range(20)} == {(96, 96)}


def test_resizing_does_not_smooth_before_reducing():
    row = torch.tensor([0, 0, 255, 0, 0, 0, 0, 0, 255, 0, 0, 0], dtype=torch.uint8).expand(3, 12, 12).contiguous()
    reduced = resize_image(row, (4, 4))  # centres 1, 4, 7, 10: the bright columns 2 and 8 fall between them
    assert reduced.max() == 0


def test_resizing_interpolates_between_half_pixel_centres():
    ramp = torch.tensor([0, 100], dtype=torch.uint8).expand(3, 2, 2).contiguous()
    assert resize_image(ramp, (2, 4))[0, 0].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("size", [(60, 80), (37, 49), (131, 173), (60, 33), (240, 320)])
def test_resizing_is_bilinear_interpolation_in_double_precision(size):
    image = random_sample().image
    exact = functional.interpolate(image.double()[None], size, mode="bilinear")[0]
    assert (resize_image(image, size) - exact).abs().max() < 0.5001


def test_a_box_of_a_resized_image_is_the_same_as_a_crop_of_all_of_it():
    image = random_sample(45, 70).image
    for index in range(40):
        generator = sample_generator(0, 0, index)
        size = random_size((45, 70), (64, 256), (0.5, 2), generator)
        top, left, height, width = box = random_box(size, 64, generator)
        whole = resize_image(image, size)
        assert torch.equal(resize_image(image, size, box), whole[:, top : top + height, left : left + width])


def test_masks_take_the_nearest_label_and_invent_none():
    mask = torch.tensor([[0, 255], [7, 3]], dtype=torch.uint8)
    assert resize_mask(mask, (4, 4)).tolist() == mask.repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    assert set(resize_mask(random_sample().mask, (37, 91)).unique().tolist()) <= {0, 1, 2, 3, 4}


def test_boxes_reach_every_corner_and_stay_inside():
    boxes = {random_box((10, 12), 8, sample_generator(0, 0, i)) for i in range(400)}
    assert boxes == {(top, left, 8, 8) for top in range(3) for left in range(5)}
    assert random_box((5, 12), 8, sample_generator(0, 0, 0))[2:] == (5, 8)


@pytest.mark.parametrize(
    ("values", "varied"),
    [
        ([0] * 74 + [1] * 26, True),
        ([0] * 75 + [1] * 25, False),  # the share must be below 0.75
        ([0] * 100, False),
        ([0] * 30 + [IGNORE] * 70, False),  # one class only
        ([0] * 20 + [1] * 10 + [IGNORE] * 70, True),  # 255 does not count
        ([0] * 20 + [1] * 2 + [IGNORE] * 78, False),
        ([0] * 30 + [UNSEEN] * 70, False),  # 254 is no class either
        ([IGNORE] * 100, False),
    ],
)
def test_varied_means_two_classes_and_none_above_three_quarters(values, varied):
    assert is_varied(torch.tensor(values, dtype=torch.uint8).view(10, 10), 0.75) == varied


def test_the_box_after_the_tenth_failure_is_used():
    mask, generator, same = torch.zeros(50, 50, dtype=torch.uint8), sample_generator(0, 0, 5), sample_generator(0, 0, 5)
    eleven = [random_box(mask.shape, 20, same) for _ in range(11)]
    assert sample_crop_box(mask, 20, 0.75, generator) == eleven[-1]
    assert torch.equal(generator.get_state(), same.get_state()), "exactly eleven boxes were drawn"


def test_the_first_varied_box_is_used():
    mask = random_sample(80, 80).mask
    assert sample_crop_box(mask, 40, 0.75, sample_generator(0, 0, 1)) == random_box(
        (80, 80), 40, sample_generator(0, 0, 1)
    )


def test_hsv_equals_opencv():
    rgb = torch.tensor([[109, 130, 194], [200, 30, 31], [12, 250, 249], [90, 90, 89], [255, 128, 1], [3, 2, 1]])
    hsv = [[113, 112, 194], [0, 217, 200], [90, 243, 250], [30, 3, 90], [15, 254, 255], [15, 170, 3]]
    assert rgb_to_hsv(rgb.T[:, None].to(torch.uint8))[:, 0].T.tolist() == hsv


def test_hsv_is_opencvs_fixed_point_formula_for_one_colour_in_27_and_all_greys():
    levels, grey = torch.arange(0, 256, 3), torch.arange(256).expand(3, -1)
    red, green, blue = rgb = torch.cat([torch.cartesian_prod(levels, levels, levels).T, grey], 1)
    value = rgb.amax(0)
    delta = value - rgb.amin(0)
    by_value, by_delta = (
        (scale * 4096 / part.clamp(min=1)).round().long() for scale, part in ((255, value), (30, delta))
    )
    sector = torch.where(value == green, blue - red + 2 * delta, red - green + 4 * delta)
    hue = (torch.where(value == red, green - blue, sector) * by_delta + 2048) >> 12
    expected = torch.stack([hue + 180 * (hue < 0), (delta * by_value + 2048) >> 12, value])
    assert torch.equal(rgb_to_hsv(rgb[:, None].to(torch.uint8))[:, 0].long(), expected)


def test_the_way_back_from_hsv_agrees_with_the_standard_library():
    hsv = torch.cartesian_prod(torch.arange(0, 180, 7), torch.arange(0, 256, 15), torch.arange(0, 256, 15))
    expected = torch.tensor([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.tolist()]).T * 255
    assert (hsv_to_rgb(hsv.T[:, None].to(torch.uint8))[:, 0] - expected).abs().max() < 0.501


def test_colours_do_not_depend_on_how_many_rows_are_changed_at_a_time():
    image = random_sample(150, 40).image
    one_by_one = [shift_hue(scale_saturation(row, 0.7), 5) for row in image.split(1, 1)]
    assert torch.equal(shift_hue(scale_saturation(image, 0.7), 5), torch.cat(one_by_one, 1))


def test_hue_shift_by_nothing_or_a_full_circle_keeps_colours():
    image = random_sample(200, 200).image
    assert (shift_hue(image, 0).int() - image.int()).abs().max() <= 6  # bytes of HSV are coarser than RGB
    assert torch.equal(shift_hue(image, 0), shift_hue(image, 180))
    pure = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90], [0, 0, 0]], dtype=torch.uint8).T[:, None]
    assert torch.equal(shift_hue(pure, 0), pure)
    assert torch.equal(shift_hue(pure, 60)[:, :, :3], pure[:, :, [1, 2, 0]]), "60 half degrees: red to green to blue"


def test_colour_changes_clip_and_drop_fractions():
    values = torch.tensor([0, 3, 200, 255], dtype=torch.uint8)
    assert scale_and_shift(values, scale=1.5).tolist() == [0, 4, 255, 255]
    assert scale_and_shift(values, shift=-10.5).tolist() == [0, 0, 189, 244]
    grey = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(scale_saturation(grey, 1.4), grey)


def test_colour_changes_happen_as_often_and_as_far_as_they_should():
    image = torch.full((3, 1, 1), 100, dtype=torch.uint8)  # grey: saturation and hue have no effect
    values = [photometric_distortion(image, sample_generator(0, 0, i))[0, 0, 0].item() for i in range(2000)]
    unchanged = sum(value == 100 for value in values) / 2000
    assert 0.21 < unchanged < 0.30, "brightness and contrast are both left out a quarter of the time"
    assert 34 <= min(values) and max(values) <= 197 and min(values) < 45 and max(values) > 180


def test_padding_comes_after_normalising():
    sample = random_sample(40, 50)
    transform = TrainTransform(crop_size=64, image_scale=(40, 160), ratio_range=(1, 1), flip=0, photometric=False)
    image, mask = transform(sample.image, sample.mask, sample_generator(0, 0, 0))
    assert torch.equal(image[:, :40, :50], normalise(sample.image)) and torch.equal(mask[:40, :50], sample.mask)
    assert (image[:, 40:] == 0).all() and (image[:, :, 50:] == 0).all()
    assert (mask[40:] == IGNORE).all() and (mask[:, 50:] == IGNORE).all()
    assert (image.dtype, mask.dtype) == (torch.float32, torch.uint8)


def test_normalising_uses_imagenet_numbers_in_rgb_order():
    image = torch.tensor(IMAGENET_MEAN).round().to(torch.uint8)[:, None, None]
    assert normalise(image).abs().max() < 0.01
    assert normalise(torch.zeros(3, 1, 1, dtype=torch.uint8)).flatten().tolist() == pytest.approx(
        [-2.1179, -2.0357, -1.8044], abs=1e-4
    )


def test_padding_leaves_larger_images_alone():
    assert pad_to(torch.zeros(3, 70, 64), 64, 0.0).shape == (3, 70, 64)


@pytest.mark.parametrize("size", [(60, 80), (20, 31), (200, 90), (64, 64)])
def test_every_training_image_has_the_size_of_the_crop(size):
    sample = random_sample(*size)
    transform = TrainTransform(crop_size=64, image_scale=(64, 256))
    for index in range(10):
        image, mask = transform(sample.image, sample.mask, sample_generator(0, 0, index))
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and image.isfinite().all()


def test_image_and_mask_stay_aligned():
    mask = random_sample(60, 80).mask
    image = (mask * 50).expand(3, 60, 80).contiguous()
    transform = TrainTransform(crop_size=64, image_scale=(60, 240), ratio_range=(1, 1), photometric=False)
    for index in range(10):
        image_out, mask_out = transform(image, mask, sample_generator(0, 0, index))
        inside = mask_out != IGNORE
        values = (image_out[0] * 58.395 + 123.675).round().long() // 50
        assert torch.equal(values[inside], mask_out[inside].long())


def test_same_generator_same_result_and_every_argument_counts():
    sample, transform = random_sample(), TrainTransform(crop_size=32, image_scale=(48, 192))
    outputs = {
        key: transform(*sample[:2], sample_generator(*key))[0] for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    again = transform(*sample[:2], sample_generator(0, 0, 0))[0]
    assert torch.equal(outputs[0, 0, 0], again)
    assert all(not torch.equal(outputs[0, 0, 0], outputs[key]) for key in list(outputs)[1:])


def test_global_random_state_is_neither_used_nor_changed():
    sample, transform = random_sample(), TrainTransform(crop_size=32, image_scale=(48, 192))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform(*sample[:2], sample_generator(0, 0, 3))[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, transform(*sample[:2], sample_generator(0, 0, 3))[0])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 400), (31, 31)])
def test_test_images_have_an_exact_short_side_and_their_own_mask(height, width):
    sample = random_sample(height, width)
    image, mask = EvalTransform(short_side=128)(sample.image, sample.mask)
    assert min(image.shape[1:]) == 128 and mask is sample.mask
    assert max(image.shape[1:]) == int(max(height, width) * 128 / min(height, width) + 0.5)


def make_data(samples, setting="inductive"):
    transform = TrainTransform(crop_size=32, image_scale=(48, 192))
    return SegmentationData(samples, lookup=label_to_train_id(LABELS, setting), transform=transform)


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_unseen_labels_influence_nothing_not_even_the_crop(setting):
    samples = [random_sample(seed=seed) for seed in range(60)]
    tampered = []
    for index, sample in enumerate(samples):
        other = torch.tensor([1, 3], dtype=torch.uint8)[torch.randint(2, sample.mask.shape)]
        paint = other if index % 2 else torch.full_like(other, 1)
        tampered.append(sample._replace(mask=torch.where((sample.mask == 1) | (sample.mask == 3), paint, sample.mask)))
    for left, right in zip(make_data(samples, setting), make_data(tampered, setting), strict=True):
        assert torch.equal(left.image, right.image) and torch.equal(left.mask, right.mask)


def test_inductive_training_masks_hold_seen_rows_only():
    found = {
        label
        for item in make_data([random_sample(seed=seed) for seed in range(20)])
        for label in item.mask.unique().tolist()
    }
    assert found == {0, 1, 2, IGNORE}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_epoch_and_index_only(workers):
    data = make_data([random_sample(seed=seed) for seed in range(6)])
    keys = [(epoch, index) for epoch in (0, 1, 0) for index in range(6)]
    images = torch.cat([batch.image for batch in DataLoader(data, sampler=keys, batch_size=2, num_workers=workers)])
    expected = [data.transform(*_remapped(data, i), sample_generator(0, epoch, i))[0] for epoch, i in keys]
    assert torch.equal(images, torch.stack(expected))
    assert not torch.equal(images[0], images[6]), "another epoch draws anew"


def _remapped(data, index):
    sample = data.base[index]
    return sample.image, data.lookup[sample.mask.int()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 60, 80, dtype=torch.uint8)}, r"sample 0: the image is \(1, 60, 80\) uint8"),
        ({"image": torch.zeros(60, 80, 3, dtype=torch.uint8)}, r"sample 0: the image is \(60, 80, 3\) uint8"),
        ({"image": torch.zeros(3, 60, 80)}, r"sample 0: the image is \(3, 60, 80\) float32"),
        ({"mask": torch.zeros(60, 79, dtype=torch.uint8)}, r"sample 0: the mask has shape \(60, 79\)"),
        ({"mask": torch.zeros(60, 80, 3, dtype=torch.uint8)}, r"sample 0: the mask has shape \(60, 80, 3\)"),
        ({"mask": torch.full((60, 80), 5, dtype=torch.uint8)}, "sample 0: label 5 is outside the class list"),
        ({"mask": torch.zeros(60, 80, dtype=torch.int64)}, "sample 0: the mask has type torch.int64"),
    ],
)
def test_bad_samples_are_named(change, message):
    with pytest.raises(UserError, match=message):
        make_data([random_sample()._replace(**change)])[0]


def test_impossible_settings_are_refused():
    for wrong in [{"crop_size": 0}, {"ratio_range": (2.0, 0.5)}, {"image_scale": (0, 5)}]:
        with pytest.raises(UserError, match=next(iter(wrong))):
            TrainTransform(**wrong)
