"""Optimal transport against numbers of the authors' code, and the properties that a plan must have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from sptseg.evaluation.evaluate import evaluation_path, load_model, recipe_of_run
from sptseg.models.clip import load_clip
from sptseg.models.segmenter import build_segmenter
from sptseg.models.transport import EPSILON, MAX_ROUNDS, THRESHOLD, Transport, TransportDecoder, TransportPlan, sinkhorn
from sptseg.recipe import check_recipe
from sptseg.training.loop import train
from sptseg.training.run_folder import WEIGHTS

VECTORS = load_file(Path(__file__).parent / "reference_family/otseg_sinkhorn.safetensors")


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("kind, rounds", [("easy", 17), ("hard", 100)])
def test_plan_rounds_and_gradient_are_the_authors(kind, rounds):
    cost = VECTORS[f"input.cost_{kind}"].requires_grad_()  # (problems, patches, templates)
    plan, done = TransportPlan.apply(torch.exp(-cost.mT / EPSILON), "batch", MAX_ROUNDS, THRESHOLD)
    (plan.mT * VECTORS[f"input.weights_{kind}"]).sum().backward()
    assert done.tolist() == [rounds] * len(cost) == VECTORS[f"output.iterations_{kind}"].tolist() * len(cost)
    assert relative(plan.mT, VECTORS[f"output.plan_{kind}"]) < 1e-5
    assert relative(cost.grad, VECTORS[f"output.grad.cost_{kind}"]) < 1e-5


@pytest.mark.parametrize("stop", ["image", "batch"])
def test_gradient_is_that_of_automatic_differentiation(stop):
    torch.manual_seed(0)
    kernel = torch.exp((torch.rand(3, 2, 4, 9, dtype=torch.float64) - 1) / EPSILON).requires_grad_()
    options, weights = (stop, MAX_ROUNDS, THRESHOLD), torch.randn(3, 2, 4, 9, dtype=torch.float64)
    plan, done = TransportPlan.apply(kernel, *options)
    a, history, _ = sinkhorn(kernel, *options)
    assert len(set(done.tolist())) == (1 if stop == "batch" else 3), "the case has images that stop at different rounds"
    [ours] = torch.autograd.grad((plan * weights).sum(), kernel)
    [automatic] = torch.autograd.grad((history[-1] * kernel * a * weights).sum(), kernel)
    assert torch.allclose(ours, automatic, rtol=1e-9, atol=0)


def test_marginals_and_a_fixed_number_of_rounds():
    kernel = torch.exp((torch.rand(2, 3, 4, 25, generator=torch.Generator().manual_seed(1)) - 1) / EPSILON)
    plan, done = TransportPlan.apply(kernel, "image", 7, 0)
    assert done.tolist() == [7, 7]
    assert torch.allclose(plan.sum(-1), torch.tensor(1 / 4), rtol=1e-5), "the scale that is matched last is exact"
    converged, _ = TransportPlan.apply(kernel, "image", 100, 0)
    assert torch.allclose(converged.sum(-2), torch.tensor(1 / 25), rtol=1e-3)


def test_an_image_does_not_depend_on_its_batch_unless_asked():
    torch.manual_seed(0)
    queries, patches = torch.randn(3, 2, 4, 8), torch.randn(3, 30, 8)
    for transport in (Transport().eval(), Transport(stop="image")):
        together, alone = transport(queries, patches), transport(queries[1:2], patches[1:2])
        assert alone[2] == together[2][1] and torch.allclose(together[1][1:2], alone[1], rtol=1e-4, atol=1e-9)
        assert together[2].unique().numel() > 1
    for transport in (Transport(), Transport(stop="batch").eval()):
        assert transport(queries, patches)[2].unique().numel() == 1, "in training, the batch stops as one"


def test_options_change_the_transport():
    torch.manual_seed(0)
    queries, patches = torch.randn(1, 2, 4, 8), torch.randn(1, 30, 8)
    score, plan, done = Transport().eval()(queries, patches)
    assert Transport(rounds=3).eval()(queries, patches)[2] == 3 < done
    smooth = Transport(epsilon=1.0).eval()(queries, patches)[1]
    assert smooth.std() < plan.std(), "more entropy, a smoother plan"
    config = check_recipe({**TINY, "transport_rounds": 7, "transport_epsilon": 0.1, "layer_maps": "last"})
    decoder = build_segmenter(load_clip("glyph-clip").visual, config.segmenter_config()).decoder
    assert {(one.transport.rounds, one.transport.epsilon) for one in (decoder, decoder.layers[0].cross)} == {(7, 0.1)}
    text, patches, cls = torch.randn(2, 3, 128), torch.randn(1, 128, 4, 4), torch.randn(1, 128)
    decoder.eval()
    last = decoder.paths(patches, cls, text)[0]
    decoder.layer_maps = "product"
    assert not torch.allclose(last, decoder.paths(patches, cls, text)[0])


def test_mixed_precision_leaves_the_transport_in_float32():
    queries, patches = torch.randn(1, 2, 4, 8), torch.randn(1, 30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        score, plan, _ = Transport()(queries, patches)
    assert score.dtype == plan.dtype == torch.float32 and torch.equal(score, Transport()(queries, patches)[0])


def test_one_layer_and_equal_templates():
    decoder, text = TransportDecoder(width=8, num_layers=1).eval(), F.normalize(torch.randn(3, 1, 8), dim=-1)
    patches, cls = F.normalize(torch.randn(2, 8, 4, 5), dim=1), F.normalize(torch.randn(2, 8), dim=-1)
    assert decoder(patches, cls, text).shape == (2, 3, 4, 5)
    four = decoder(patches, cls, text.expand(3, 4, 8))
    assert torch.allclose(four, 4 * decoder(patches, cls, text), atol=1e-4), "equal templates share the patches equally"


TINY = {
    **{"dataset": "glyphs-20", "image_size": 32, "num_prompts": 2, "decoder_layers": 2, "train_images": 6},
    **{"val_images": 1, "iterations": 4, "batch_size": 2, "warmup_iterations": 0, "lr": 1e-3, "checkpoint_every": 1},
    **{"method": "otseg+", "setting": "transductive"},
}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_changes_nothing(tmp_path, interrupted_after, stop):
    recipe = check_recipe(TINY)
    train(recipe, tmp_path / "whole", progress=False)
    with interrupted_after(stop):
        train(recipe, tmp_path / "stopped", progress=False)
    train(recipe, tmp_path / "stopped", progress=False)
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "stopped"))
    assert first == second


def test_otseg_and_its_ensemble_are_one_model(tmp_path):
    weights = []
    for method in ("otseg", "otseg+"):
        train(check_recipe({**TINY, "method": method}), tmp_path / method, progress=False)
        weights.append(load_file(tmp_path / method / WEIGHTS))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert weights[0]["class_embeddings"].shape == (20, 5, 128)
    folder, found = tmp_path / "otseg", []
    for changes in ({}, {"method": "otseg+"}):
        recipe = recipe_of_run(folder, **changes)
        found.append(evaluation_path(folder, recipe, {}).name)
        model = load_model(recipe, folder / WEIGHTS)[1]
        assert model.decoder.ensemble == model.config.ensemble == (0.5 if changes else 1.0)
    assert found == ["evaluation-glyphs-20.json", "evaluation-glyphs-20-otseg+.json"]
