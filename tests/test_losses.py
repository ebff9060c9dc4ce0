"""Losses against loops over images, classes and pixels, and the labels that they are computed from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_msssim import ssim
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sptseg.training.fused_losses
import sptseg.training.mask_losses
from sptseg.core import IGNORE, UNSEEN, UserError
from sptseg.training.fused_losses import Blur, Focal, NegativeSSIM, Similarity, apply_separable, fused_losses, make_axis
from sptseg.training.losses import pseudo_label, segmentation_loss
from sptseg.training.mask_losses import (
    dense_losses,
    dice_loss,
    focal_loss,
    one_hot_target,
    present_classes,
    ssim_loss,
)

REFERENCE = Path(__file__).resolve().parent / "reference"


def batch(images=3, classes=4, height=6, width=5, seed=0):
    """Logits and labels; class 3 is absent everywhere, the last image has nothing but ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, height, width, generator=generator)
    label = torch.randint(0, classes - 1, (images, height, width), generator=generator)
    label[0, :2], label[-1] = IGNORE, IGNORE
    return logits, label


def maps_of(logits, label):
    """Logits and target of every image and class, as arrays."""
    for image, truth in zip(logits.double().numpy(), label.numpy(), strict=True):
        for index, values in enumerate(image):
            yield values, (truth == index).astype(float)


def test_targets_are_one_hot_and_empty_where_ignored():
    _, label = batch()
    target = one_hot_target(label, 4)
    assert target.dtype == torch.float32 and torch.equal(target.sum(1), (label != IGNORE).float())
    assert torch.equal(target.argmax(1)[label != IGNORE], label[label != IGNORE])
    assert torch.equal(one_hot_target(label.to(torch.uint8), 4), target)


@pytest.mark.parametrize("wrong", [4, UNSEEN, 256, -1])
def test_a_label_outside_the_trained_classes_is_refused(wrong):
    _, label = batch()
    label[1, 2, 3] = wrong
    with pytest.raises(UserError, match=f"label {wrong} .*0..3"):
        one_hot_target(label, 4)


def test_focal_loss_equals_a_loop():
    logits, label = batch()
    total = 0.0
    for values, target in maps_of(logits, label):
        pixels = []
        for x, t in zip(values.ravel(), target.ravel(), strict=True):
            p = 1 / (1 + math.exp(-x))
            p_t, alpha = (p, 0.25) if t else (1 - p, 0.75)
            pixels.append(-alpha * (1 - p_t) ** 2 * math.log(p_t))
        total += sum(pixels) / len(pixels)
    found = focal_loss(logits, one_hot_target(label, 4), 7.0)
    assert math.isclose(found.item(), total / 7, rel_tol=1e-5)


def test_dice_loss_equals_a_loop_over_present_classes():
    logits, label = batch()
    total, masks = 0.0, 0
    for values, target in maps_of(logits, label):
        if target.any():
            p = 1 / (1 + np.exp(-values))
            total += 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
            masks += 1
    target = one_hot_target(label, 4)
    assert present_classes(label, 4).sum() == masks == 6
    assert math.isclose(dice_loss(logits, target, masks).item(), total / masks, rel_tol=1e-5)


def test_ssim_loss_equals_a_loop():
    logits, label = batch(images=2, height=13, width=12)
    offsets = np.arange(11) - 5
    bell = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for x, t in maps_of(logits, label):
        x, t = np.pad(x, 5), np.pad(t, 5)
        for row in range(13):
            for column in range(12):
                place = slice(row, row + 11), slice(column, column + 11)
                mean_x, mean_t = (window * x[place]).sum(), (window * t[place]).sum()
                var_x, var_t = (window * x[place] ** 2).sum() - mean_x**2, (window * t[place] ** 2).sum() - mean_t**2
                covariance = (window * x[place] * t[place]).sum() - mean_x * mean_t
                luminance = (2 * mean_x * mean_t + 0.01**2) / (mean_x**2 + mean_t**2 + 0.01**2)
                values.append(luminance * (2 * covariance + 0.03**2) / (var_x + var_t + 0.03**2))
    assert math.isclose(ssim_loss(logits, one_hot_target(label, 4)).item(), 1 - np.mean(values), abs_tol=1e-5)


@pytest.mark.parametrize("auxiliary", ["ssim", "dice", "ssim-probabilities", None])
def test_the_total_is_the_weighted_sum(auxiliary):
    logits, label = batch()
    terms = segmentation_loss(logits, label, auxiliary=auxiliary)
    plain = segmentation_loss(logits, label, auxiliary=auxiliary, focal_weight=1.0, auxiliary_weight=1.0)
    assert terms.keys() == {"focal", "loss", *([auxiliary] if auxiliary else [])}
    assert torch.isclose(terms["focal"], 100 * plain["focal"])
    assert torch.isclose(terms["loss"], sum(term for name, term in terms.items() if name != "loss"))
    assert torch.isclose(terms["focal"], 100 * focal_loss(logits, one_hot_target(label, 4), 6))


def test_probabilities_and_logits_are_different_ssim_losses():
    logits, label = batch()
    target = one_hot_target(label, 4)
    as_probabilities = segmentation_loss(logits, label, auxiliary="ssim-probabilities")["ssim-probabilities"]
    assert torch.isclose(as_probabilities, ssim_loss(logits.sigmoid(), target))
    assert not torch.isclose(as_probabilities, ssim_loss(logits, target), atol=1e-3)


@pytest.mark.parametrize("auxiliary", ["ssim", "dice", "ssim-probabilities"])
def test_a_batch_without_any_label_is_finite(auxiliary):
    logits = batch()[0].requires_grad_()
    terms = segmentation_loss(logits, torch.full((3, 6, 5), IGNORE), auxiliary=auxiliary)
    terms["loss"].backward()
    assert all(torch.isfinite(term) for term in terms.values()) and torch.isfinite(logits.grad).all()
    assert terms["focal"] > 0, "ignored pixels are negatives of every class"


def test_ignored_pixels_are_negatives():
    logits, label = batch()
    loss = segmentation_loss(logits, label)["focal"]
    logits[0, :, 0, 0] += 5  # an ignored pixel
    assert segmentation_loss(logits, label)["focal"] > loss


@pytest.mark.parametrize("auxiliary", ["ssim", "dice"])
def test_two_half_batches_with_the_mean_number_of_masks_make_the_whole(auxiliary):
    logits, label = batch(images=4)
    leaf = logits.clone().requires_grad_()
    whole = segmentation_loss(leaf, label, auxiliary=auxiliary)
    whole["loss"].backward()
    halves = [(logits[part].clone().requires_grad_(), label[part]) for part in (slice(0, 2), slice(2, 4))]
    share = torch.stack([present_classes(truth, 4).sum().float() for _, truth in halves]).mean()
    terms = [segmentation_loss(x, truth, auxiliary=auxiliary, num_masks=share) for x, truth in halves]
    for term in terms:
        term["loss"].backward()
    for name in ("focal", auxiliary, "loss"):
        assert torch.isclose(sum(term[name] for term in terms) / 2, whole[name], rtol=1e-5)
    assert torch.allclose(torch.cat([x.grad for x, _ in halves]) / 2, leaf.grad, atol=1e-6)


def test_losses_are_computed_in_float32():
    logits, label = batch()
    halved = segmentation_loss(logits.bfloat16(), label)["loss"]
    assert halved.dtype == torch.float32 and halved == segmentation_loss(logits.bfloat16().float(), label)["loss"]


@pytest.mark.parametrize("auxiliary", ["ssim", "dice"])
def test_labels_may_be_bytes(auxiliary):
    logits, label = batch()
    wide, bytes_ = (segmentation_loss(logits, kind, auxiliary=auxiliary) for kind in (label, label.byte()))
    assert all(torch.equal(wide[name], bytes_[name]) for name in wide)


def test_pseudo_labels_name_the_best_unseen_class_and_nothing_else():
    logits, label = batch()
    logits.requires_grad_()
    label[1, :3] = UNSEEN
    given = pseudo_label(logits, label, (3, 1))
    hidden = label == UNSEEN
    assert torch.equal(given[~hidden], label[~hidden]) and hidden.any()
    for image, y, x in hidden.nonzero().tolist():
        assert given[image, y, x] == (3 if logits[image, 3, y, x] > logits[image, 1, y, x] else 1)
    assert not given.requires_grad and given.dtype == label.dtype
    assert torch.equal(pseudo_label(logits, given, (3, 1)), given)


def small_masks(seed, classes=6, dtype=torch.float32):
    """Masks of a random grid and labels of another random size: regions of some classes, a part of it ignored."""
    rng = np.random.default_rng(seed)
    grid, (height, width) = rng.integers(1, 9, 2), rng.integers(1, 70, 2)
    generator = torch.Generator().manual_seed(seed)
    masks = 2 * torch.randn(2, classes, *grid, generator=generator, dtype=dtype)
    tiles = torch.randint(0, classes - 1, (2, 1, 3, 2), generator=generator)
    label = F.interpolate(tiles.float(), (int(height), int(width)))[:, 0].long()
    label[torch.rand(label.shape, generator=generator) < rng.choice([0, 0.2, 1])] = IGNORE
    return masks.requires_grad_(), label


def losses_and_gradients(function, masks, label, auxiliary):
    """Both losses, and their gradients in the masks."""
    terms = function(masks, label, auxiliary, torch.tensor(3.0))
    used = [term for term in terms if term.requires_grad]
    return torch.stack(terms), [torch.autograd.grad(term, masks, retain_graph=True)[0] for term in used]


def ssim_loss_in_float64(prediction, target):
    """The definition by pytorch_msssim, with all its numbers in float64."""
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(prediction.shape[1], 1, 1, -1)
    return 1 - ssim(*(F.pad(maps.double(), (5, 5, 5, 5)) for maps in (prediction, target)), data_range=1.0, win=window)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("auxiliary", ["ssim", "dice", "ssim-probabilities", None])
@pytest.mark.parametrize("seed", range(12))
def test_split_losses_equal_whole_ones(seed, auxiliary, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(sptseg.training.fused_losses.PIXELS, "cpu", 5000)  # several maps at a time, several times
    if dtype == torch.float64:
        monkeypatch.setattr(sptseg.training.mask_losses, "ssim_loss", ssim_loss_in_float64)
        monkeypatch.setattr(
            sptseg.training.mask_losses, "one_hot_target", lambda *given: one_hot_target(*given).double()
        )
    masks, label = small_masks(seed, dtype=dtype)
    whole, expected = losses_and_gradients(dense_losses, masks, label, auxiliary)
    split, found = losses_and_gradients(fused_losses, masks, label, auxiliary)
    assert torch.allclose(split, whole, rtol=tolerance / 10, atol=1e-6 if dtype == torch.float32 else 0)
    for a, b in zip(found, expected, strict=False):  # without an auxiliary loss the second one has no gradient
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (7, 9), (2, 3), (1, 1)])
def test_split_losses_serve_masks_of_the_label_s_size_and_larger_ones(size):
    masks, label = torch.randn(2, 3, 3, 4, requires_grad=True), torch.randint(0, 3, (2, *size))
    whole, expected = losses_and_gradients(dense_losses, masks, label, "ssim")
    split, found = losses_and_gradients(fused_losses, masks, label, "ssim")
    assert torch.allclose(split, whole, rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("auxiliary", ["ssim", "dice", None])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gradients_are_the_derivatives(seed, auxiliary):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 2, (2, 7, 5), generator=generator)
    label[0, :seed] = IGNORE

    def losses(masks):
        focal, other = fused_losses(masks, label, auxiliary, torch.tensor(3.0))
        return (focal, other) if auxiliary else focal

    assert torch.autograd.gradcheck(losses, masks)


def test_hand_written_derivatives_are_right():
    maps, target = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(0, 2, (2, 6, 5)).double()
    x, square, product = (part.requires_grad_() for part in (maps, (maps + 1) ** 2, maps * target))
    assert torch.autograd.gradcheck(Blur.apply, [x])
    masks = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    axes = make_axis(3, 6, masks.dtype), make_axis(2, 5, masks.dtype)
    assert torch.autograd.gradcheck(lambda masks: Focal.apply(masks, None, *axes), masks)
    assert torch.autograd.gradcheck(lambda masks: Focal.apply(masks, target, *axes), masks)
    assert torch.autograd.gradcheck(lambda masks: NegativeSSIM.apply(masks, *axes), masks)
    assert torch.autograd.gradcheck(Similarity.apply, [x, square, Blur.apply(target), product])


def test_local_means_come_from_the_small_masks():
    for seed in range(12):
        masks, label = small_masks(seed, dtype=torch.float64)
        rows, columns = (make_axis(*sizes, masks.dtype) for sizes in zip(masks.shape[2:], label.shape[1:], strict=True))
        resized = F.interpolate(masks, label.shape[1:], mode="bilinear", align_corners=False)
        points = apply_separable(rows.add_midpoints, masks, columns.add_midpoints)
        assert torch.allclose(apply_separable(rows.resize, masks, columns.resize), resized)
        assert torch.allclose(apply_separable(rows.mean, masks, columns.mean), Blur.apply(resized))
        assert torch.allclose(apply_separable(rows.mean_square, points**2, columns.mean_square), Blur.apply(resized**2))


@pytest.mark.parametrize("auxiliary", ["ssim", "dice"])
def test_small_masks_and_resized_ones_have_one_training_loss(auxiliary):
    masks, label = small_masks(4)
    resized = F.interpolate(masks, label.shape[1:], mode="bilinear", align_corners=False)
    small, large = (segmentation_loss(x, label, auxiliary=auxiliary) for x in (masks, resized))
    assert small.keys() == large.keys()
    assert all(torch.isclose(small[name], large[name], rtol=1e-5) for name in small)
    (3 * small["loss"] + small["focal"]).backward()
    found, masks.grad = masks.grad, None
    (3 * large["loss"] + large["focal"]).backward()
    assert (found - masks.grad).abs().max() < 1e-5 * masks.grad.abs().max()


def test_settings_outside_do_not_shorten_the_numbers():
    masks, label = small_masks(4)
    expected = segmentation_loss(masks, label)["loss"]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert segmentation_loss(masks, label)["loss"] == expected
        assert torch.get_float32_matmul_precision() == "medium", "the setting is restored"
    finally:
        torch.set_float32_matmul_precision(before)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("auxiliary", ["ssim", "dice", "ssim-probabilities"])
def test_memory_does_not_grow_with_the_classes(auxiliary, monkeypatch):
    monkeypatch.setitem(sptseg.training.fused_losses.PIXELS, "cpu", 2 * 64 * 64)
    masks, label = torch.randn(1, 40, 4, 4, requires_grad=True), torch.randint(0, 20, (1, 64, 64))
    with LargestTensor() as seen:
        segmentation_loss(masks, label, auxiliary=auxiliary)["loss"].backward()
    assert seen.elements <= 2 * 74 * 74, "two maps, padded"


def test_present_classes_are_those_with_a_pixel():
    for seed in range(12):
        _, label = small_masks(seed)
        target = one_hot_target(label, 6)
        assert torch.equal(present_classes(label, 6), target.amax((2, 3)) > 0)
        assert torch.equal(present_classes(label.to(torch.uint8), 6).sum().float(), target.amax((2, 3)).sum())
    with pytest.raises(UserError, match="label 5 .*0..4"):
        present_classes(torch.full((1, 2, 2), 5), 5)


def test_pseudo_labels_from_small_masks_are_those_of_resized_ones():
    masks, label = small_masks(4)
    label[:, ::2] = UNSEEN
    resized = F.interpolate(masks, label.shape[1:], mode="bilinear", align_corners=False)
    assert torch.equal(pseudo_label(masks, label, (1, 4, 5)), pseudo_label(resized, label, (1, 4, 5)))


@pytest.mark.parametrize("name", ["upsample", "same_size", "all_ignored"])
@pytest.mark.parametrize("method, auxiliary", [("spt", "ssim"), ("zegclip", "dice")])
def test_split_losses_reproduce_the_authors_vectors(method, auxiliary, name):
    recorded = load_file(REFERENCE / f"{method}_loss_{name}.safetensors")
    masks, label = recorded["input.logits"].requires_grad_(), recorded["input.label"]
    num_masks = present_classes(label, masks.shape[1]).sum().clamp(min=1)
    focal, other = fused_losses(masks, label, auxiliary, num_masks)
    for term, loss in {"mask": 100 * focal, auxiliary: other}.items():
        expected, slope = recorded[f"output.loss_{term}"][0], recorded[f"output.grad.loss_{term}"]
        found = torch.autograd.grad(loss, masks, retain_graph=True)[0]
        assert torch.isclose(loss, expected, rtol=1e-5, atol=1e-7)
        assert (found - slope).abs().max() <= 1e-5 * slope.abs().max()
