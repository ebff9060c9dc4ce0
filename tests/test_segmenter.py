"""All methods as one module, sliding windows against a loop, and files that are refused when they do not fit."""

import json

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sptseg.core import UserError
from sptseg.inference.windows import (
    average_windows,
    candidate_classes,
    class_scores,
    labels_from_masks,
    merge_windows,
    predict_labels,
    resize_masks,
    slide_scores,
    window_places,
    window_starts,
)
from sptseg.models.segmenter import METHODS, build_segmenter, load_segmenter, read_segmenter_file, save_segmenter
from sptseg.models.transport import TransportDecoder, set_transports
from sptseg.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = {"image_size": 32, "num_prompts": 3}
PARTS = {"clip-rc": {"regions": 2}}  # fit three blocks and 4×4 patches
PARTS |= dict.fromkeys(("cascade-clip", "cascade-clip+sgd"), {"tapped_blocks": "1-2"})
BASELINES = {"projection": {}, "two-stage": {"proposals": 3}}  # CLIP stays as it is
TEXT = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def text_of(model):
    """The class embeddings in the form that a model needs: those of OTSeg are per template."""
    return torch.stack([TEXT, TEXT.flip(-1), TEXT.roll(1, -1)], 1) if model.config.templates_apart else TEXT


def make_visual(width=24):
    torch.manual_seed(0)
    return VisionTransformer(32, 8, width, 3, 2, 2.0, output_dim=16, act_layer=QuickGELU)


def make(method="spt-seg", visual=None, **options):
    torch.manual_seed(0)
    config = METHODS[method].model_copy(
        update={**SMALL, **PARTS.get(method, {}), **BASELINES.get(method, {}), **options}
    )
    return build_segmenter(visual or make_visual(), config).eval()


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_every_trained_tensor_gets_a_gradient_and_clip_none(method, layers):
    torch.manual_seed(0)
    model = make(method, decoder_layers=layers).train()
    outputs = model(torch.randn(4, 3, 32, 32), text_of(model), outputs=True)
    (outputs.masks.square().sum() + sum(outputs.losses.values())).backward()
    trained = model.trained_tensors()
    assert not [name for name, tensor in trained.items() if tensor.grad is None]
    assert all(tensor.grad is None for tensor in model.encoder.visual.parameters())
    visual = {f"encoder.visual.{name}" for name, _ in model.encoder.visual.named_parameters()}
    assert model.stored_tensors().keys() == {name for name, _ in model.named_parameters()} - visual
    frozen = {name for name in model.stored_tensors() if name.startswith(("encoder.region", "encoder.tap_"))}
    assert bool(frozen) == (method in PARTS) and trained.keys() == model.stored_tensors().keys() - frozen


def test_methods_are_made_of_the_two_parts():
    for method in METHODS.keys() - (PARTS | BASELINES):
        model = make(method)
        assert isinstance(model.decoder, TransportDecoder) == method.startswith("otseg")
        assert (model.encoder.spectral_prompt is not None) == (method in ("spt-seg", "zegclip+spt"))
        assert hasattr(model.decoder.last, "hilo") == (method in ("spt-seg", "zegclip+sgd"))
    assert make(prompted_blocks=2).encoder.deep_prompts.embeddings.shape == (2, 3, 24)


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
@pytest.mark.parametrize("method", METHODS)
def test_everything_is_computed_where_the_model_is(method, size):
    """Fake tensors know their device without having it: an operand left on the CPU raises an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = make(method).train(method != "two-stage")  # which has no masks of classes in training
            set_transports(model, rounds=3, threshold=0)  # else the number depends on values
            text = torch.empty(5, 4, 16) if model.config.templates_apart else torch.empty(5, 16)
        masks = model(torch.empty(2, 3, *size, device="cuda"), text)
        assert masks.device.type == "cuda" and masks.shape == (2, 5, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [({"image_size": 30}, "image_size: 30"), ({"spectral_blocks": "1-4"}, "'1-4'"), ({"decoder": "x"}, "'x'")],
)
def test_impossible_models_are_refused(options, culprit):
    with pytest.raises(UserError, match=culprit):
        make(**options)


def test_scores_of_seen_classes_are_lowered():
    logits = torch.randn(2, 5, 3, 4)
    scores = class_scores(logits, (0, 3))
    assert torch.allclose(scores[:, [1, 2, 4]], logits[:, [1, 2, 4]].sigmoid())
    assert torch.allclose(scores[:, [0, 3]], logits[:, [0, 3]].sigmoid() - 0.1)
    assert torch.equal(class_scores(logits), logits.sigmoid())


@pytest.mark.parametrize("stride", [1, 7, 26, 32])
@pytest.mark.parametrize("length", [5, 31, 32, 33, 57, 64, 101])
def test_windows_cover_every_pixel_and_stay_inside(length, stride):
    starts = window_starts(length, 32, stride)
    covered = {pixel for start in starts for pixel in range(start, min(start + 32, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] == max(length - 32, 0)
    assert all(after - before <= stride for before, after in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("size", [(32, 32), (45, 71), (33, 97), (90, 32)])
def test_slide_scores_equal_a_loop(size):
    model, image = make(), torch.randn(1, 3, *size)
    with torch.no_grad():
        found = slide_scores(model, image, TEXT, stride=26, seen=(0, 1))
        total, count = torch.zeros(1, 5, *size), torch.zeros(size)
        y = 0
        while True:
            top, x = min(y, size[0] - 32), 0
            while True:
                left = min(x, size[1] - 32)
                masks = model(image[..., top : top + 32, left : left + 32], TEXT)
                masks = F.interpolate(masks, (32, 32), mode="bilinear", align_corners=False)
                lowered = masks.sigmoid() - torch.tensor([0.1, 0.1, 0, 0, 0])[:, None, None]
                total[..., top : top + 32, left : left + 32] += lowered
                count[top : top + 32, left : left + 32] += 1
                if x + 32 >= size[1]:
                    break
                x += 26
            if y + 32 >= size[0]:
                break
            y += 26
    assert torch.allclose(found, total / count, atol=1e-5)
    labels = predict_labels(model, image, TEXT, stride=26, seen=(0, 1), output_size=(50, 40))
    resized = F.interpolate(total / count, (50, 40), mode="bilinear", align_corners=False)
    assert labels.shape == (50, 40) and (labels != resized.argmax(1)[0]).sum() <= 3


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("size", [(32, 32), (45, 71)])
def test_labels_of_many_classes_are_those_of_all_scores_at_once(count, size):
    model, image, text = make(), torch.randn(1, 3, *size), F.normalize(torch.randn(count, TEXT.shape[1]), dim=-1)
    text = torch.cat([text, text[:1]])  # of two equal classes the first one counts
    seen = tuple(range(0, count, 3))
    with torch.no_grad():
        scores = slide_scores(model, image, text, stride=26, seen=seen)
    for output_size in (None, (50, 40)):
        expected = resize_masks(scores, output_size or size).argmax(1)[0]
        found = predict_labels(model, image, text, stride=26, seen=seen, output_size=output_size)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [3, 5, 19, 40])
def test_labels_within_a_memory_budget_are_those_of_all_scores_at_once(monkeypatch, count, at_once):
    model, image = make(image_size=72), torch.randn(1, 3, 160, 200)
    text, largest = F.normalize(torch.randn(count, TEXT.shape[1]), dim=-1), []
    with torch.no_grad():
        scores = slide_scores(model, image, text, stride=60, seen=(0, 2))

    def resized(masks, size):
        largest.append(masks.shape[1])
        return resize_masks(masks, size)

    monkeypatch.setattr("sptseg.inference.windows.resize_masks", resized)
    monkeypatch.setattr("sptseg.inference.windows.MAX_SCORES", at_once * 12 * 72**2)  # 12 windows
    for threshold in (None, 0.5):
        labels = predict_labels(model, image, text, stride=60, seen=(0, 2), output_size=(180, 231), threshold=threshold)
        best, expected = resize_masks(scores, (180, 231))[0].max(0)
        assert torch.equal(labels, expected if threshold is None else expected.masked_fill(best < threshold, -1))
    assert max(largest) <= (3 if count == 3 else at_once)


@pytest.mark.parametrize("present", [0, 1, 5, 60])
@pytest.mark.parametrize("num_classes", [20, 40, 59, 171])
def test_classes_that_win_nowhere_are_left_out_and_change_nothing(num_classes, present):
    torch.manual_seed(present)
    masks, sides, seen = torch.randn(4, num_classes, 4, 5) - 7, (45, 71), range(0, num_classes, 2)
    masks[:, torch.randperm(num_classes)[:present]] += 6
    places = window_places(sides, (32, 40), (26, 33))
    assert len(places) == len(masks)
    scores = merge_windows(class_scores(resize_masks(masks, (32, 40)), seen), places, sides)
    for size in (sides, (50, 40)):
        expected = resize_masks(scores, size)[0]
        found = candidate_classes(masks, lambda classes, all_scores=expected: all_scores[classes], seen)
        assert set(expected.argmax(0).flatten().tolist()) <= set(found.tolist())
        assert len(found) < num_classes or num_classes == 20 or present in (0, 60), "something is left out"
        labels = labels_from_masks(masks, places, (32, 40), sides, seen=seen, output_size=size)
        assert torch.equal(labels, expected.argmax(0))


def test_rounding_leaves_out_no_winner():
    """In bfloat16, scores have two digits."""
    masks = (torch.randn(1, 50, 6, 6, generator=torch.Generator().manual_seed(0)) - 3).bfloat16()
    scores = class_scores(resize_masks(masks, (48, 48)))[0]
    found = candidate_classes(masks, lambda classes: scores[classes], ())
    assert set(scores.argmax(0).flatten().tolist()) <= set(found.tolist())


def test_windows_may_be_oblong():
    image = torch.randn(1, 3, 50, 41)
    found = average_windows(lambda windows: windows + 1, image, window=(16, 40), stride=(11, 3))
    assert torch.allclose(found, image + 1, atol=1e-5)


def test_a_map_of_the_right_size_is_left_alone():
    masks = torch.randn(1, 2, 6, 5)
    assert resize_masks(masks, (6, 5)) is masks and resize_masks(masks, (12, 9)).shape == (1, 2, 12, 9)


@pytest.fixture
def saved(tmp_path):
    return save_segmenter(tmp_path / "model.safetensors", make(), clip="tiny", method="spt-seg")


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_answers_the_same(tmp_path, method):
    model, images = make(method, decoder_layers=2, class_embedding_count=1), torch.randn(2, 3, 32, 32)
    for tensor in model.stored_tensors().values():
        tensor.data += 0.1 * torch.randn_like(tensor)
    path = save_segmenter(tmp_path / "folder/model.safetensors", model, clip="tiny", method=method)
    torch.manual_seed(9)
    again = load_segmenter(path, make_visual(), clip="tiny", expected=model.config)
    text = text_of(model)
    assert torch.equal(again(images, text), model(images, text)) and not again.training
    assert read_segmenter_file(path)[1]["method"] == method


def test_equal_models_give_equal_files(saved, tmp_path):
    for attempt in range(8):
        path = save_segmenter(tmp_path / f"{attempt}.safetensors", make(), clip="tiny", method="spt-seg")
        assert path.read_bytes() == saved.read_bytes()


def test_clip_is_not_in_the_file(saved):
    model, stored = make(), load_file(saved)
    assert stored.keys() == model.stored_tensors().keys() and not any("visual" in name for name in stored)
    assert saved.stat().st_size < 4 * sum(tensor.numel() for tensor in stored.values()) + 20_000, "nothing else is"
    assert [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]


OLD_PARTS = {"norm1": "cross_norm", "norm2": "ffn_norm", "linear1": "expand", "linear2": "contract"}


def with_old_names(tensors):
    """The same tensors under the names of a decoder layer's parts that earlier versions wrote."""
    return {".".join(OLD_PARTS.get(part, part) for part in name.split(".")): value for name, value in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_files_with_old_names_of_tensors_load(tmp_path, method):
    model, images = make(method), torch.randn(2, 3, 32, 32)
    for tensor in model.trained_tensors().values():
        tensor.data += 0.1 * torch.randn_like(tensor)
    path = save_segmenter(tmp_path / "model.safetensors", model, clip="tiny")
    old = with_old_names(load_file(path))
    assert (old.keys() != load_file(path).keys()) == (method != "projection")
    rewrite(path, old)
    assert read_segmenter_file(path)[2].keys() == model.stored_tensors().keys()
    again = load_segmenter(path, make_visual(), clip="tiny")
    assert torch.equal(again(images, text_of(model)), model(images, text_of(model)))


def test_checkpoints_with_old_names_of_tensors_load(tmp_path):
    model, again = make(), make()
    optimisers = [torch.optim.AdamW(one.trained_tensors().values()) for one in (model, again)]
    for tensor in model.trained_tensors().values():
        tensor.data += 0.1 * torch.randn_like(tensor)
    old = with_old_names(model.trained_tensors())
    save_checkpoint(tmp_path, 5, old, optimisers[0], {"train": [], "val": []}, keep=1)
    assert load_checkpoint(tmp_path, again, optimisers[1])[0] == 5
    restored = again.trained_tensors()
    assert all(torch.equal(restored[name], tensor) for name, tensor in model.trained_tensors().items())


def rewrite(path, tensors=None, **notes):
    """The same file with other tensors or another note of its metadata; None takes a note out."""
    with safe_open(path, "pt") as file:
        notes = {**json.loads(file.metadata()["sptseg"]), **notes}
    text = json.dumps({key: note for key, note in notes.items() if note is not None})
    save_file(load_file(path) if tensors is None else tensors, path, {"sptseg": text})


REFUSALS = {
    "another clip": (lambda path: None, {"clip": "other"}, "'tiny', not 'other'"),
    "another method": (lambda path: None, {"expected": METHODS["zegclip"]}, "decoder='sgd' .wanted 'zegclip'"),
    "another width": (lambda path: None, {"visual": make_visual(48)}, "do not fit"),
    "a cut off file": (lambda path: path.write_bytes(path.read_bytes()[:-100]), {}, "cannot be read"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:20]), {}, "cannot be read"),
    "an empty file": (lambda path: path.write_bytes(b""), {}, "cannot be read"),
    "another format": (lambda path: path.write_text("weights: none"), {}, "cannot be read"),
    "no file": (lambda path: path.unlink(), {}, "cannot be read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), {}, "cannot be read"),
    "no metadata": (lambda path: save_file(load_file(path), path), {}, "not written by sptseg"),
    "broken metadata": (lambda path: save_file(load_file(path), path, {"sptseg": "{"}), {}, "configuration"),
    "no configuration": (lambda path: rewrite(path, config=None), {}, "config"),
    "no name of a clip": (lambda path: rewrite(path, clip=None), {}, "clip"),
    "an unknown key": (lambda path: rewrite(path, config={"colour": 1}), {}, "colour"),
    "a missing tensor": (lambda path: rewrite(path, dict(list(load_file(path).items())[1:])), {}, "do not fit"),
    "a tensor too many": (lambda path: rewrite(path, {**load_file(path), "x": torch.ones(1)}), {}, "such as x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_files_that_do_not_fit_are_refused_in_one_line(saved, case):
    damage, options, message = REFUSALS[case]
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        load_segmenter(saved, **{"visual": make_visual(), "clip": "tiny", **options})
    assert str(error.value).startswith(f"{saved}: ") and "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("sptseg.models.segmenter.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_segmenter(saved, make(), clip="tiny")
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = build_segmenter(make_visual(), METHODS["spt-seg"].model_copy(update={"image_size": 32}))
    with torch.no_grad():
        model.decoder.layers[0].linear1.weight[0, 0] = float("inf")
    path = save_segmenter(tmp_path / "m.safetensors", model, clip="tiny")
    with pytest.raises(UserError, match="1 not finite, such as decoder.layers.0.linear1.weight"):
        load_segmenter(path, make_visual(), clip="tiny")
