"""CLIP-RC, Cascade-CLIP and OTSeg against numbers of their authors' code, and parts that these cannot show."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sptseg.app.formats import FORMATS, WindowModel, trace, without_fft
from sptseg.core import UserError
from sptseg.models.segmenter import METHODS, build_segmenter, load_segmenter, read_segmenter_file, save_segmenter
from sptseg.paper.complexity import (
    conventions,
    count_by_torch,
    count_operations,
    count_values,
    leftover_modules,
    release_detours,
    vit_b_16,
)
from sptseg.recipe import check_recipe
from sptseg.releases.convert import convert_checkpoint
from sptseg.releases.models import read_segmenter
from sptseg.releases.names import our_name, reason_to_leave_out
from sptseg.releases.reference import check_reference, read_manifest
from sptseg.training.run import make_optimizer

FOLDER = Path(__file__).parent / "reference_family"
CASES = read_manifest(FOLDER)
FULL = json.loads((FOLDER / "full_scale.json").read_text())
TINY = {"dataset": "glyphs-20", "image_size": 64, "num_prompts": 2}
REPOS = {"clip_rc": "clip-rc", "cascade_clip": "cascade-clip"}


def test_the_authors_vectors_are_reproduced():
    lines = []
    assert check_reference(FOLDER, report=lines.append), [line for line in lines if "FAIL" in line]
    stored = sum(sum(key.startswith("output.") for key in load_file(FOLDER / case["file"])) for case in CASES.values())
    assert sum("  ok" in line for line in lines) == stored


def test_the_set_is_as_it_was_recorded():
    for case in CASES.values():
        assert sha256((FOLDER / case["file"]).read_bytes()).hexdigest() == case["sha256"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6_500_000


def trained_state(name):
    """A train case, and the weights of its model by official names."""
    case = CASES[name]
    tensors = load_file(FOLDER / case["state_from"])
    return case, {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == "train"])
def test_what_is_trained_frozen_or_left_out_is_what_it_is_in_the_authors_code(name):
    case, state = trained_state(name)
    backbone = case["config"]["backbone"]
    model, left_out = read_segmenter(state, image_size=64, heads=backbone["heads"])
    last = model.config.decoder_layers - 1
    unused = {name for name in state if reason_to_leave_out(name, last, False) is not None}
    assert set(case["requires_grad_but_never_used"]) <= unused == set(left_out)
    trained = model.trained_tensors().keys()
    prompts = {"backbone.prompt_embeddings", "backbone.deep_prompt_embeddings"}
    ours = {name for name in state.keys() - prompts - unused if our_name(name, last) in trained}
    assert ours | prompts | set(case["requires_grad_but_never_used"]) == set(case["requires_grad"])


FULL_SIZE = [(repo, case) for repo in (*REPOS, "otseg") for case in FULL[repo]]


def full_size(repo, case):
    """A model of the papers' size, and the shape of the texts of all classes."""
    _, prompts, _, classes, _ = case.split("_")
    settings = {"num_prompts": int(prompts)}
    model = build_segmenter(vit_b_16(), METHODS[REPOS.get(repo, "otseg+")].model_copy(update=settings))
    templates = {"20": 6, "171": 8}[classes]
    return model, (int(classes), *[templates] * model.config.templates_apart, 512)


@pytest.mark.parametrize(("repo", "case"), FULL_SIZE)
def test_parameters_at_full_size(repo, case):
    record = FULL[repo][case]
    with torch.device("meta"):
        model, _ = full_size(repo, case)
    used, unused = count_values(model, trained=True), leftover_modules(model.config, 512)
    assert used == record["really_trained"]
    assert used + sum(map(count_values, unused.values())) == record["requires_grad"]
    frozen = sum(t.numel() for t in model.stored_tensors().values()) - used
    assert frozen == sum(record["frozen_in_backbone_and_not_in_clip"].values())
    names = {f"{name}.{inside}" for name, module in unused.items() for inside, _ in module.named_parameters()}
    assert names <= FULL[repo]["voc_10_tokens_20_classes"]["parameters"].keys()


@pytest.mark.parametrize(("repo", "case"), FULL_SIZE)
def test_products_at_full_size_are_those_of_the_authors_code(repo, case):
    """Exactly, but for the detours and for contractions that fvcore rounds to four digits."""
    record = FULL[repo][case]["gflops_by_operator"]
    with FakeTensorMode():
        model, shape = full_size(repo, case)
        ours = count_by_torch(model, torch.empty(1, 3, 512, 512), torch.empty(shape))[""]
    prompts, regions = model.config.num_prompts, model.config.regions**2
    outputs = 12 * prompts * (10 * 768**2 + 2 * 768 * (1025 + prompts + regions)) + prompts * 768 * 512
    detours = {"clip_rc": 15 * shape[0] * 1024 * 512, "cascade_clip": 6 * (1 + prompts) * 768 * 512}.get(repo, 0)
    if repo != "otseg":
        detours += {"clip_rc": 16, "cascade_clip": 3}[repo] * shape[0] * 512 // 2
    theirs = sum(value for name, value in record.items() if name not in ("layer_norm", "upsample_bilinear2d"))
    assert ours + outputs + detours == pytest.approx(1e9 * theirs, abs=5e-4 * 1e9 * record["einsum"])


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "case"), FULL_SIZE)
def test_operations_at_full_size_are_those_of_the_authors_code(repo, case):
    with torch.device("meta"):
        model, shape = full_size(repo, case)
    model = model.to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.normal_(std=0.02)
    table = count_operations(model, torch.zeros(1, 3, 512, 512), torch.zeros(shape))
    total = conventions(table)["published"] + sum(release_detours(model, shape[0]).values())
    theirs = FULL[repo][case]
    rounding = 5e-4 * 1e9 * theirs["gflops_by_operator"]["einsum"]
    assert total == pytest.approx(1e9 * theirs["gflops_attention_counted"][""], abs=rounding)


def recipe_of(name, **changes):
    parts = {"clip-rc": {"regions": 2}, "cascade-clip": {"tapped_blocks": "1-6"}}[name]
    return check_recipe({"method": name, **parts, **TINY, **changes})


@pytest.mark.parametrize("repo", REPOS)
def test_the_authors_checkpoints_are_converted(tmp_path, repo):
    state = {
        key.removeprefix("state."): tensor
        for key, tensor in load_file(FOLDER / f"{repo}_model_eval.safetensors").items()
        if key.startswith("state.")
    }
    path, recipe = tmp_path / "released.pth", recipe_of(REPOS[repo])
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    report = convert_checkpoint(path, tmp_path / "run", recipe=recipe, unchecked=True)
    assert report["method"] == recipe.method
    written = read_segmenter_file(report["weights"])
    assert written.config == recipe.segmenter_config()
    kept = {"clip_rc": ("region_tokens", "region_level_bridge"), "cascade_clip": ("tap_projections", "proj_layers")}
    ours, theirs = kept[repo]
    assert torch.equal(written.tensors[f"encoder.{ours}"], state[f"backbone.{theirs}"])
    with pytest.raises(UserError, match=f"use a recipe of {recipe.method}"):
        convert_checkpoint(path, tmp_path / "other", recipe=check_recipe({**TINY, "method": "zegclip"}), unchecked=True)
    del state[f"backbone.{theirs}"]
    torch.save(state, path)
    with pytest.raises(UserError, match=f"{ours}: missing"):
        convert_checkpoint(path, tmp_path / "other", recipe=recipe, unchecked=True)


def small(method="clip-rc", layers=4, **options):
    torch.manual_seed(0)
    visual = VisionTransformer(32, 8, 24, layers, 2, 2.0, output_dim=16, act_layer=QuickGELU)
    parts = {"clip-rc": {"regions": 2}, "cascade-clip": {"tapped_blocks": "2-3"}}[method]
    config = METHODS[method].model_copy(update={"image_size": 32, "num_prompts": 3, **parts, **options})
    return visual, build_segmenter(visual, config).eval()


@pytest.mark.parametrize("method", REPOS.values())
def test_added_parameters_may_be_trained(method):
    added = {name for name in small(method)[1].stored_tensors() if "region_tokens" in name or "tap_" in name}
    model = small(method, freeze_added=False)[1]
    assert added and added <= model.trained_tensors().keys()
    outputs = model(torch.randn(2, 3, 32, 32), F.normalize(torch.randn(4, 16), dim=-1), outputs=True)
    (outputs.masks.square().sum() + sum(outputs.losses.values())).backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in added)


def test_taps_are_stored_and_never_drawn_again(tmp_path):
    visual, model = small("cascade-clip")
    path = save_segmenter(tmp_path / "model.safetensors", model, clip="tiny")
    torch.manual_seed(7)
    again = load_segmenter(path, visual, clip="tiny")
    assert torch.equal(again.encoder.tap_projections, model.encoder.tap_projections)
    tensors = load_file(path)
    del tensors["encoder.tap_projections"]
    metadata = {"sptseg": json.dumps({"clip": "tiny", "config": model.config.model_dump()})}
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="tap_projections"):
        load_segmenter(path, visual, clip="tiny")


@pytest.mark.parametrize(
    ("method", "options", "culprit"),
    [
        ("clip-rc", {"regions": 5}, "regions: 5 per side do not fit 4x4 patches"),
        ("cascade-clip", {"tapped_blocks": "2-4"}, "tapped_blocks: '2-4' is not a range of blocks within 1-3"),
        ("cascade-clip", {"tapped_blocks": "1-3"}, "tapped_blocks: 3 blocks cannot form two equal groups"),
    ],
)
def test_parts_that_do_not_fit_are_refused(method, options, culprit):
    with pytest.raises(UserError, match=culprit):
        small(method, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"regions": 4},
        {"method": "clip-rc", "tapped_blocks": "1-2"},
        {"method": "zegclip", "freeze_added": True},
        {"method": "clip-rc", "layer_maps": "last"},
        {"method": "otseg", "zero_start": True},
        {"method": "zegclip", "proposals": 10},
        {"method": "projection", "spectral_blocks": "1-2"},
        {"method": "projection", "focal_weight": 1.0},
        {"method": "two-stage", "num_prompts": 5},
    ],
)
def test_keys_of_other_methods_are_refused(settings):
    with pytest.raises(UserError, match="has no such part"):
        check_recipe({"dataset": "voc", **settings})


def test_initial_values_may_be_chosen():
    visual, model = small("cascade-clip", tap_start="clip")
    assert all(torch.equal(one, visual.proj) for one in model.encoder.tap_projections)
    assert torch.equal(model.encoder.tap_norms[1].weight, visual.ln_post.weight)
    zero, plain = (small("clip-rc", zero_start=start)[1].decoder.layers for start in (True, False))
    assert not any(layer.features.linear2.weight.any() for layer in zero)
    assert all(layer.features.linear2.weight.any() for layer in plain)
    assert all(layer.queries.linear2.weight.any() for layer in zero)


def test_mixing_weights_need_not_decay():
    model = small("cascade-clip")[1]
    recipe = recipe_of("cascade-clip", decay_mixing=False)
    decays = {
        id(p): group["weight_decay"] for group in make_optimizer(model, recipe).param_groups for p in group["params"]
    }
    assert len(decays) == len(model.trained_tensors())
    for name, tensor in model.trained_tensors().items():
        assert decays[id(tensor)] == (0.0 if "mixing" in name else recipe.weight_decay), name
    assert len(make_optimizer(model, recipe_of("cascade-clip")).param_groups) == 1


@pytest.mark.parametrize("options", [{"spectral_blocks": "1-2"}, {"decoder": "sgd", "spectral_blocks": "1-2"}])
@pytest.mark.parametrize("method", REPOS.values())
def test_spectral_parts_fit_in(method, options):
    if method == "clip-rc":
        options = {**options, "decoder": "zegclip"}
    model = small(method, **options)[1]
    masks = model(torch.randn(2, 3, 32, 40), F.normalize(torch.randn(4, 16), dim=-1))
    assert masks.shape == (2, 4, 4, 5)
    assert hasattr(model.decoder, "stages") == (method == "cascade-clip")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", REPOS.values())
def test_exported_files_answer_as_the_model(tmp_path, method, kind):
    """ONNX files for any classes, programs for fixed ones with a bias; `test_export` swaps them."""
    taps = {"tapped_blocks": "1-2"} if method == "cascade-clip" else {}
    model = small(method, layers=3, decoder_layers=1, **taps)[1]
    text = F.normalize(torch.randn(4, 16), dim=-1)
    for tensor in model.parameters():
        tensor.data += 0.1 * torch.randn_like(tensor)
    copied = without_fft(model)
    assert not any("recovery" in name for name, _ in copied.named_parameters())
    fixed, inputs = ((text, (0,), 0.1), ()) if kind == "torch-export" else ((), (text,))
    images, path = torch.randn(3, 3, 32, 32), tmp_path / f"model{FORMATS[kind].suffix}"
    FORMATS[kind].write(trace(WindowModel(copied, *fixed), 32, (16,)), path, {})
    scores, labels = FORMATS[kind].open(path)([images, *inputs])
    with torch.no_grad():
        expected = WindowModel(model, *fixed)(images, *inputs)
    assert abs(scores - expected[0].numpy()).max() < 1e-5 and (labels == expected[1].numpy()).all()
