"""Losses against loops over pictures, classes and pixels, and the labels that they are computed from."""

import math

import numpy as np
import pytest
import torch

from sptseg.core import IGNORE, UNSEEN, UserError
from sptseg.losses import (
    count_masks,
    dice_loss,
    focal_loss,
    one_hot_target,
    pseudo_label,
    segmentation_loss,
    ssim_loss,
)


def batch(pictures=3, classes=4, height=6, width=5, seed=0):
    """Logits and labels; class 3 is absent everywhere, the last picture has nothing but ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(pictures, classes, height, width, generator=generator)
    label = torch.randint(0, classes - 1, (pictures, height, width), generator=generator)
    label[0, :2], label[-1] = IGNORE, IGNORE
    return logits, label


def maps_of(logits, label):
    """Logits and target of every picture and class, as arrays."""
    for picture, truth in zip(logits.double().numpy(), label.numpy(), strict=True):
        for index, values in enumerate(picture):
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
    assert count_masks(target).item() == masks == 6
    assert math.isclose(dice_loss(logits, target, masks).item(), total / masks, rel_tol=1e-5)


def test_ssim_loss_equals_a_loop():
    logits, label = batch(pictures=2, height=13, width=12)
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
    logits, label = batch(pictures=4)
    leaf = logits.clone().requires_grad_()
    whole = segmentation_loss(leaf, label, auxiliary=auxiliary)
    whole["loss"].backward()
    halves = [(logits[part].clone().requires_grad_(), label[part]) for part in (slice(0, 2), slice(2, 4))]
    share = torch.stack([count_masks(one_hot_target(truth, 4)) for _, truth in halves]).mean()
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


def test_pseudo_labels_name_the_best_unseen_class_and_nothing_else():
    logits, label = batch()
    logits.requires_grad_()
    label[1, :3] = UNSEEN
    given = pseudo_label(logits, label, (3, 1))
    hidden = label == UNSEEN
    assert torch.equal(given[~hidden], label[~hidden]) and hidden.any()
    for picture, y, x in hidden.nonzero().tolist():
        assert given[picture, y, x] == (3 if logits[picture, 3, y, x] > logits[picture, 1, y, x] else 1)
    assert not given.requires_grad and given.dtype == label.dtype
    assert torch.equal(pseudo_label(logits, given, (3, 1)), given)
