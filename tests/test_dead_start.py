"""Task tokens that keep no patch: found on the first batch, said, and nothing else changes."""

import warnings

import open_clip
import pytest
import torch
from torch.nn import functional as F

from sptseg.models.decoder import Decoder, kept_share, selections
from sptseg.models.recording import recorded
from sptseg.models.segmenter import METHODS, build_segmenter
from sptseg.recipe import check_recipe
from sptseg.training import run
from sptseg.training.dead_start import CHECKED, dead_start_check, dead_start_text
from sptseg.training.loop import train

VISUAL = open_clip.transformer.VisionTransformer(32, 8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)
TEXT = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def point_tokens(model, images, signs):
    """Turn the task token of every layer along (1) or against (-1) all transformed patches."""
    with torch.no_grad():
        feature_map = model.encoder(images)[0]
        crosses = [*(layer.cross for layer in model.decoder.layers), model.decoder.last]
        for cross, sign in zip(crosses, signs, strict=True):
            cross.selection.task_token.copy_(sign * F.normalize(cross.hilo(feature_map), dim=-1).mean((0, 1)))


def make(*signs, method="spt-seg"):
    torch.manual_seed(0)
    config = METHODS[method].model_copy(update={"image_size": 32, "decoder_layers": 2})
    model = build_segmenter(VISUAL, config).eval()
    if signs:
        point_tokens(model, IMAGES, signs)
    return model


def batch(model, iteration=0, first=0, average=lambda value: value):
    """The warnings of one batch."""
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dead_start_check(model, iteration, first, seed=5, average=average):
            model(IMAGES, TEXT).square().sum().backward()
    return [str(warning.message) for warning in caught]


def test_the_share_is_that_of_the_patches_with_a_positive_cosine():
    [selection] = selections(Decoder(kind="sgd", width=16, num_layers=1)).values()
    patches = torch.randn(2, 40, 16)
    cosines = F.cosine_similarity(patches, selection.task_token, dim=-1)
    assert kept_share(selection, (patches,)) == pytest.approx((cosines > 0).float().mean().item())
    assert list(selections(make())) == ["decoder.layers.0.cross.selection", "decoder.last.selection"]
    assert not selections(make(method="zegclip"))


def test_a_live_start_is_not_mentioned():
    model = make(1, 1)
    assert batch(model) == [] and any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_dead_start_has_masks_and_gradients_of_zero_and_is_said():
    model = make(-1, -1)
    [said] = batch(model)
    assert not model(IMAGES, TEXT).any() and not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert said.startswith(
        "iteration 0: the task token keeps no patch in decoder layers 1, 2 of 2: all gradients are 0"
    )
    assert "another seed than 5" in said and "\n" not in said


def test_a_single_dead_layer_is_named():
    [first], [last] = batch(make(-1, 1)), batch(make(1, -1))
    assert "in decoder layer 1 of 2: this adds nothing of the image" in first
    assert "in decoder layer 2 of 2: all gradients are 0" in last, "without the last layer there is no mask"


def test_gradients_of_zero_are_said_without_a_selection_too():
    model = make(method="zegclip")
    assert batch(model) == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.zero_grad()
        with dead_start_check(model, 0, 0, 5, lambda value: value):
            (0 * model(IMAGES, TEXT)).sum().backward()
    assert "the loss reaches no parameter: all gradients are 0" in str(caught[0].message)


def test_it_looks_at_the_first_batch_and_again_50_later_also_after_a_continuation():
    model = make(-1, -1)
    assert CHECKED == (0, 50)
    assert [i for i in range(0, 120, 10) if batch(model, i)] == [0, 50]
    assert [i for i in range(300, 420, 10) if batch(model, i, first=300)] == [300, 350]
    assert "iteration 350" in batch(model, 350, first=300)[0]


def test_patches_that_another_process_keeps_count():
    model = make(-1, -1)
    assert "keeps no patch" not in batch(model, average=lambda value: value + 0.25)[0]


def test_the_check_changes_no_gradient_and_no_random_number():
    results = []
    for iteration in (0, 1):  # with and without a look
        model = make().train()
        torch.manual_seed(3)
        batch(model, iteration)
        gradients = [p.grad for p in model.trained_tensors().values() if p.grad is not None]
        results.append((gradients, torch.get_rng_state()))
    assert len(results[0][0]) == len(results[1][0]) > 20 and torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(*pair) for pair in zip(results[0][0], results[1][0], strict=True))


def test_hooks_go_after_an_error_too():
    model = make()
    with pytest.raises(RuntimeError, match="stop"), recorded(dict(model.named_modules())):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), dead_start_check(model, 0, 0, 0, lambda value: value):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_calls_are_recorded_in_order():
    layer = torch.nn.Linear(2, 2)
    with recorded({"a": layer, "b": torch.nn.ReLU()}) as outputs:
        expected = [layer(torch.ones(size, 2)) for size in (1, 3)]
    layer(torch.ones(1, 2))
    assert outputs["b"] == [] and all(torch.equal(*pair) for pair in zip(outputs["a"], expected, strict=True))


def test_no_text_without_a_problem():
    assert dead_start_text({"last": 0.01}, learns=True, iteration=0, seed=0) is None
    assert dead_start_text({}, learns=True, iteration=0, seed=0) is None


TINY = {
    **{"method": "spt-seg", "dataset": "glyphs-20", "image_size": 32, "iterations": 3, "batch_size": 2, "lr": 1e-4},
    **{"dropout": 0.0, "warmup_iterations": 0, "ratio_range": (1.0, 1.0), "photometric": False, "tracker": "none"},
    **{
        "train_images": 4,
        "val_images": 1,
        "eval_every": 3,
        "checkpoint_every": 3,
        "decoder_layers": 1,
        "live_start": False,
    },
}


@pytest.mark.parametrize("sign", [1, -1])
def test_training_warns_once_at_its_start(tmp_path, monkeypatch, sign):
    build = run.build_segmenter

    def turned(visual, config):
        model = build(visual, config)
        point_tokens(model.eval(), torch.rand(4, 3, 32, 32), [sign])
        return model.train()

    monkeypatch.setattr(run, "build_segmenter", turned)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = train(check_recipe(TINY), tmp_path, progress=False)
    said = [str(warning.message) for warning in caught if "task token" in str(warning.message)]
    assert len(said) == (sign == -1)
    losses = [row["loss"] for row in results["history"]["train"]]
    assert (said == []) or (said[0].startswith("iteration 0: ") and len(losses) == 3)
