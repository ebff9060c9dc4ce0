"""The projection baseline and the two-stage system: parts by hand, and the whole by the same commands."""

from itertools import permutations

import pytest
import torch
from torch.nn import functional as F

import sptseg
from sptseg.app.export import export_model
from sptseg.core import IGNORE, ignore_label
from sptseg.inference.windows import resize_masks
from sptseg.models.clip import load_clip
from sptseg.models.decoder import DecoderOutputs
from sptseg.models.projection import FrozenEncoder
from sptseg.models.proposals import CropDecoder, ProposalEncoder, mask_squares, masked_crops
from sptseg.models.segmenter import METHODS, build_segmenter
from sptseg.recipe import check_recipe
from sptseg.training.loop import train
from sptseg.training.losses import training_loss
from sptseg.training.mask_losses import dice_loss, focal_loss, pixel_loss, present_classes
from sptseg.training.matching import EMPTY, free_queries, matching_cost, query_label

OPTIONS = {"auxiliary": "dice", "focal_weight": 100.0, "auxiliary_weight": 1.0}
TINY = {
    **{"dataset": "glyphs-20", "image_size": 32, "train_images": 6, "val_images": 1, "iterations": 1, "batch_size": 2},
    **{"warmup_iterations": 0, "lr": 1e-3},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_before_training_the_projection_is_clip():
    clip = load_clip("glyph-clip")
    model = build_segmenter(clip.visual, METHODS["projection"].model_copy(update={"image_size": 96})).eval()
    images, text = torch.randn(2, 3, 96, 96), F.normalize(torch.randn(5, clip.embed_dim), dim=-1)
    with torch.no_grad():
        patches, cls = FrozenEncoder(visual=clip.visual)(images)
        expected = (100 * torch.einsum("cd,bdhw->bchw", text, patches)).softmax(1)
        assert torch.allclose(model(images, text).sigmoid(), expected, atol=1e-5)
        assert torch.allclose(cls, F.normalize(clip.visual(images), dim=-1), atol=1e-5)
    assert sum(tensor.numel() for tensor in model.trained_tensors().values()) == clip.embed_dim * (clip.embed_dim + 1)


def test_cross_entropy_by_hand():
    logits, label = torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2, 2, 2))
    label[0, 0] = IGNORE
    chosen = [
        -logits[b, :, y, x].log_softmax(0)[label[b, y, x]] for b in (0, 1) for y in (0, 1) for x in (0, 1) if b or y
    ]
    assert torch.isclose(pixel_loss(logits, label), sum(chosen) / 8)
    whole = pixel_loss(logits, label)
    assert torch.isclose(
        whole, torch.stack([pixel_loss(*part) for part in zip(logits.split(1), label.split(1), strict=True)]).mean()
    )


def test_the_cost_of_a_pair_is_its_loss():
    logits, target = torch.randn(4, 9), (torch.rand(3, 9) > 0.5).float()
    for query in range(4):
        for segment in range(3):
            pair = logits[query].view(1, 1, 3, 3), target[segment].view(1, 1, 3, 3), 1
            expected = 100 * focal_loss(*pair) + dice_loss(*pair)
            assert torch.isclose(matching_cost(logits, target)[query, segment], expected, rtol=1e-5)


def test_the_assignment_is_the_best_of_all():
    logits, label = torch.randn(1, 4, 6, 6), torch.randint(0, 3, (1, 6, 6))
    cost = matching_cost(logits[0].flatten(1), F.one_hot(label[0], 3).float().flatten(0, 1).mT)
    best = min(permutations(range(4), 3), key=lambda queries: sum(cost[q, s] for s, q in enumerate(queries)))
    assert torch.equal(query_label(logits, label, 3), torch.tensor(best)[label])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(order[query_label(logits[:, order], label, 3)], query_label(logits, label, 3))


def test_segments_without_a_query_are_unlabelled():
    named = query_label(torch.randn(1, 2, 6, 6), torch.arange(36).view(1, 6, 6) // 12, 5)
    assert named.unique().numel() == 3 and (named == ignore_label(2)).sum() == 12


def test_queries_without_a_segment_have_no_loss():
    logits, label = torch.randn(2, 4, 8, 8, requires_grad=True), torch.full((2, 8, 8), IGNORE)
    label[0, :2] = 1
    given = {"present": present_classes(label, 3), **OPTIONS}
    terms = training_loss(DecoderOutputs(logits, {"": logits}, {}, "proposals"), label, **given)
    terms["loss"].backward()
    owner = int(query_label(logits, label, 3)[0, 0, 0])
    others = [query for query in range(4) if query != owner]
    assert logits.grad[0, owner].all() and not logits.grad[0, others].any() and not logits.grad[1].any()
    assert (free_queries(logits, query_label(logits, label, 3))[1] == EMPTY).all()


def test_squares_and_crops():
    inside = torch.zeros(2, 16, 16, dtype=torch.bool)
    inside[0, 2:6, 4:12] = True
    assert mask_squares(inside)[0].tolist() == [4, 0, 12, 8]
    image = torch.arange(16.0).expand(1, 3, 16, 16) + 1
    crops = masked_crops(image, torch.where(inside, 9.0, -9.0)[None], 8)
    assert torch.allclose(crops[0, 0, 3, 1:7], torch.arange(6.0, 12), atol=0.01) and not crops[0, :, [0, 7]].any()
    assert not crops[1].any(), "an empty mask"


def test_two_stages_by_hand():
    clip = load_clip("glyph-clip")
    encoder, decoder = ProposalEncoder(visual=clip.visual, proposals=3).eval(), CropDecoder(logit_scale=30.0)
    images, text = torch.randn(2, 3, 96, 96), F.normalize(torch.randn(4, clip.embed_dim), dim=-1)
    with torch.no_grad():
        masks, crops = encoder(images)
        scores = decoder(masks, crops, text).sigmoid()
        for image, one, found in zip(images, masks, scores, strict=True):
            inside = resize_masks(one[None], (96, 96))[0] >= 0
            cut = [masked_crops(image[None], torch.where(mask, 9.0, -9.0)[None, None], 96)[0] for mask in inside]
            classes = (30 * F.normalize(clip.visual(torch.stack(cut)), dim=-1) @ text.mT).softmax(-1)
            weights = one.sigmoid()
            expected = torch.einsum("qhw,qc->chw", weights, classes) / weights.sum(0)
            assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["projection", "two-stage"])
def test_they_predict_by_the_same_commands(tmp_path, method):
    parts = {"proposals": 4} if method == "two-stage" else {}
    train(check_recipe({**TINY, "method": method, **parts}), tmp_path / "run", progress=False)
    model = sptseg.load(tmp_path / "run", device="cpu")
    assert model.predict(torch.zeros(3, 40, 60, dtype=torch.uint8), ["red heart", "green cat"]).labels.shape == (40, 60)
    assert export_model(model, tmp_path / "model.pt2").agreement.holds
