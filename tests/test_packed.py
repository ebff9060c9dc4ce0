"""Packed weights change the speed and the last digits, and nothing else."""

import copy
import json
import pickle

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch.nn import functional as F

from sptseg.models import packed
from sptseg.models.packed import PACK, fastest_library, library_for, pack, works
from sptseg.models.segmenter import METHODS, build_segmenter
from sptseg.recipe import check_recipe
from sptseg.training.checkpoint import checkpoints
from sptseg.training.loop import train
from sptseg.training.run_folder import INPUTS, WEIGHTS

HERE = [library for library in PACK if works(library)]
TEXT = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
IMAGES = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def make(method="zegclip", activation=QuickGELU):
    torch.manual_seed(0)
    visual = VisionTransformer(32, 8, 24, 3, 2, 2.0, output_dim=16, act_layer=activation)
    config = METHODS[method].model_copy(update={"image_size": 32, "num_prompts": 3, "dropout": 0.0})
    return build_segmenter(visual, config).eval()


def results(model):
    masks = model(IMAGES.to(model.decoder.query_projection.weight.dtype), TEXT.to(model.encoder.visual.proj.dtype))
    model.zero_grad()
    masks.float().square().mean().backward()
    parts = {
        name: one.grad
        for name, one in model.trained_tensors().items()
        if one.grad is not None and not name.endswith("cross.key.bias")
    }
    with torch.inference_mode():
        return {
            "masks": masks.detach(),
            "without gradients": model(IMAGES.to(masks.dtype), TEXT.to(masks.dtype)),
            **parts,
        }


@pytest.mark.skipif(not HERE, reason="PyTorch without MKL and oneDNN")
@pytest.mark.parametrize("activation", [QuickGELU, torch.nn.GELU])
@pytest.mark.parametrize("method", ["zegclip", "spt-seg", "clip-rc"])
def test_masks_and_gradients_stay_the_same(method, activation):
    model = make(method, activation)
    expected, names, plain = results(model), list(model.state_dict()), model.encoder.run_block
    for library in HERE:
        pack(model.encoder, library)
        found = results(model)
        assert model.encoder.run_block.packed and model.encoder.run_block is not plain
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), (library, name)
        assert list(model.state_dict()) == names
        model.encoder.checkpointing = True
        assert all(torch.equal(value, found[name]) for name, value in results(model).items())
        model.encoder.checkpointing, model.encoder.run_block = False, plain


def operators_of(model):
    exported = torch.export.export(model, (IMAGES, TEXT)).graph
    traced = torch.jit.trace(model, (IMAGES, TEXT), check_trace=False).inlined_graph
    return {str(node.target) for node in exported.nodes} | {node.kind() for node in traced.nodes()}


@pytest.mark.skipif(not HERE, reason="PyTorch without MKL and oneDNN")
def test_copies_other_precisions_and_exports_see_ordinary_layers():
    model = make().requires_grad_(False)
    expected, double, operators = model(IMAGES, TEXT), copy.deepcopy(model).double(), operators_of(model)
    in_double = double(IMAGES.double(), TEXT.double())
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = model(IMAGES, TEXT)
    pack(model.encoder, HERE[0])
    pack(double.encoder, HERE[0])
    assert torch.equal(double(IMAGES.double(), TEXT.double()), in_double)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IMAGES, TEXT), in_bfloat16)
    assert operators_of(model) == operators and not model.encoder.run_block.packed
    found = model(IMAGES, TEXT)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied.encoder.run_block.packed and torch.equal(copied(IMAGES, TEXT), found)
    with torch.no_grad():
        model.encoder.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(2)
    assert not torch.allclose(model(IMAGES, TEXT), expected, rtol=1e-3), "other weights, packed again"


def test_without_the_operators_ordinary_layers_compute(monkeypatch):
    model = make()
    block, expected = model.encoder.run_block, results(model)
    wrong = {"onednn": lambda weight, rows: torch.ops.mkldnn.no_such_operator(weight), "mkl": lambda weight, rows: 0}
    monkeypatch.setattr(packed, "PACK", wrong)
    for library in (*wrong, "another"):
        with pytest.warns(UserWarning, match=f"packed weights: '{library}' is missing here"):
            pack(model.encoder, library)
    assert model.encoder.run_block is block and fastest_library.__wrapped__(64, 1) is None
    assert all(torch.equal(value, expected[name]) for name, value in results(model).items())


def test_narrow_models_and_gpus_are_not_packed(monkeypatch):
    monkeypatch.setattr(packed, "fastest_library", lambda width, threads: "mkl")
    assert library_for(make().encoder.visual, torch.device("cpu")) is None
    monkeypatch.setattr(packed, "MIN_WIDTH", 24)
    assert library_for(make().encoder.visual, torch.device("cpu")) == "mkl"
    assert library_for(make().encoder.visual, torch.device("cuda")) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert library_for(make().encoder.visual, torch.device("cpu")) is None


@pytest.mark.skipif(len(HERE) < 2, reason="PyTorch without MKL or oneDNN")
def test_a_continued_run_keeps_its_library(tmp_path, monkeypatch, one_thread):
    """Whatever a later trial says, and in spite of other last digits."""
    recipe = {"dataset": "glyphs-20", "image_size": 32, "num_prompts": 2, "decoder_layers": 2, "train_images": 6}
    recipe |= {"val_images": 1, "iterations": 3, "batch_size": 2, "warmup_iterations": 0, "checkpoint_every": 1}
    recipe = check_recipe({**recipe, "keep_final_checkpoints": True, "keep_checkpoints": 5})
    weights = {}
    for library in (*HERE, None):
        monkeypatch.setattr("sptseg.training.loop.library_for", lambda *_, library=library: library)
        train(recipe, tmp_path / str(library), progress=False)
        inputs = json.loads((tmp_path / str(library) / INPUTS).read_text())
        assert inputs.get("matmuls") == library and ("matmuls" in inputs) == (library is not None)
        weights[library] = (tmp_path / str(library) / WEIGHTS).read_bytes()
    assert weights[HERE[0]] != weights[None], "last digits differ"
    for library in (*HERE, None):
        out = tmp_path / str(library)
        other = next(one for one in HERE if one != library)
        monkeypatch.setattr("sptseg.training.loop.library_for", lambda *_, other=other: other)
        for path in (*checkpoints(out)[:2], out / WEIGHTS, out / "results.json"):
            path.unlink()
        train(recipe, out, progress=False)
        assert (out / WEIGHTS).read_bytes() == weights[library]
