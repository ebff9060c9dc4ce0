"""The data pipeline: sizes, crops, colours, order of the steps, and where its random numbers come from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize

from sptseg.core import IGNORE, UNSEEN, UserError
from sptseg.data.colours import to_tensor
from sptseg.data.crops import is_varied, random_box, sample_crop_box
from sptseg.data.label_sets import LabelSet, label_to_train_id
from sptseg.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    Sample,
    SegmentationData,
    TrainTransform,
    flip,
    normalise,
    pad_to,
    random_size,
    rescaled_size,
    resize_image,
    resize_mask,
    sample_generator,
)

MMCV = load_file(Path(__file__).parent / "reference_mmcv/pipeline.safetensors")
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
    assert (resize_image(image, size) - exact).abs().max() < 0.8, "OpenCV's weights have 11 bits"


@pytest.mark.parametrize("name", ["drawn", "noise", "mask"])
def test_resizing_gives_the_bytes_of_mmcv(name):
    image, resize = to_tensor(MMCV[name].numpy()), resize_mask if name == "mask" else resize_image
    for key in (key for key in MMCV if key.startswith(f"{name}.") and "x" in key):
        size = tuple(map(int, key.removeprefix(f"{name}.").split("x")))
        assert torch.equal(resize(image, size), to_tensor(MMCV[key].numpy())), key


def test_the_order_of_bytes_in_memory_does_not_matter():
    image = random_sample().image
    other = to_tensor(image.permute(1, 2, 0).contiguous().numpy())
    assert other.stride() != image.stride() and torch.equal(other, image)
    assert torch.equal(resize_image(other, (90, 70)), resize_image(image, (90, 70)))
    assert torch.equal(normalise(other), normalise(image))


@pytest.mark.parametrize("size", [(100, 10_000), (1, 1), (300, 3)])
def test_elongated_and_tiny_images_are_resized(size):
    image = torch.full((3, *size), 9, dtype=torch.uint8)
    height, width = rescaled_size(size, (512, 10**9))
    assert torch.equal(resize_image(image, (height, width)), torch.full((3, height, width), 9, dtype=torch.uint8))


def test_masks_of_16_bits_are_resized_flipped_and_judged_as_those_of_bytes():
    mask = random_sample().mask
    wide = mask.int() + 1000
    assert torch.equal(resize_mask(wide, (45, 91)), resize_mask(mask, (45, 91)).int() + 1000)
    assert torch.equal(flip(wide), wide.flip(1)) and torch.equal(
        flip(random_sample().image), random_sample().image.flip(2)
    )
    share = torch.bincount(mask.flatten()).max() / mask.numel()
    for part in (mask, wide):
        assert is_varied(part, share + 1e-4) and not is_varied(part, share - 1e-4)
    assert not is_varied(torch.where(wide > 1000, 65535, 1000).int(), 0.75), "65535 is no class"


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


def test_normalising_is_that_of_torchvision_exactly_and_that_of_mmcv_but_for_rounding():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    assert torch.equal(normalise(levels), normalize(levels.float(), list(IMAGENET_MEAN), list(IMAGENET_STD)))
    theirs = to_tensor(MMCV["drawn.normalised"].numpy())
    torch.testing.assert_close(normalise(to_tensor(MMCV["drawn"][:8].numpy())), theirs, rtol=1e-6, atol=1e-6)


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
