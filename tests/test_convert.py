"""Checkpoints of the releases: read without running anything, compared with CLIP, refused when they do not fit."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from sptseg.cli import main
from sptseg.core import UserError
from sptseg.evaluation.evaluate import load_model
from sptseg.models.clip import interpolate_position_embedding, load_clip
from sptseg.models.segmenter import build_segmenter, load_segmenter, read_segmenter_file
from sptseg.recipe import Recipe, load_recipe, recipe_text
from sptseg.releases.convert import about_equal, convert_checkpoint, load_plainly, summarise_conversion
from sptseg.releases.models import read_segmenter
from sptseg.releases.names import FIRST_PROMPTS, LAYER, OTHER_PROMPTS, PREFIXES, PROMPTS

FULL_SCALE = Path(__file__).resolve().parent / "reference/full_scale.json"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two CLIPs of one architecture with different weights."""
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 64, "layers": 3, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folders = [tmp_path_factory.mktemp(name) for name in ("clip", "other")]
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(open_clip.CLIP(**config).state_dict(), folder / "model.safetensors")
    return [str(folder) for folder in folders]


def a_recipe(clips, method, **settings):
    settings = {"clip": clips[0], "image_size": 48, "num_prompts": 4, "decoder_layers": 2, **settings}
    return Recipe(dataset="glyphs-20", method=method, val_images=2, **settings)


def official(ours, last):
    """The authors' name of one of our tensors."""
    if ours.startswith("decoder.last."):
        return official(f"decoder.layers.{last}.cross.{ours.removeprefix('decoder.last.')}", last)
    if ours.startswith("decoder.layers."):
        index, inside = ours.removeprefix("decoder.layers.").split(".", 1)
        return f"decode_head.decoder_1.layers.{index}.{official(inside, last)}"
    official_prefix, prefix = max(
        ((o, p) for o, p in PREFIXES.items() if ours.startswith(p) and o != "multihead_attn.proj."),
        key=lambda pair: len(pair[1]),
    )
    return official_prefix + ours.removeprefix(prefix)


def checkpoint_of(model):
    """The whole checkpoint as mmsegmentation saves it, in single precision."""
    tensors, last = dict(model.state_dict()), model.config.decoder_layers - 1
    prompts, side = tensors.pop(PROMPTS), model.config.image_size // model.encoder.visual.patch_size[0]
    position = tensors["encoder.visual.positional_embedding"]
    tensors["encoder.visual.positional_embedding"] = interpolate_position_embedding(position, (side, side))
    state = OrderedDict((official(name, last), tensor) for name, tensor in tensors.items())
    if model.config.decoder == "zegclip":
        state = OrderedDict((name.replace("hlfs.proj", "multihead_attn.proj"), t) for name, t in state.items())
    state |= {FIRST_PROMPTS: prompts[:1], OTHER_PROMPTS: prompts[1:], "text_encoder.proj": torch.zeros(2)}
    state["decode_head.decoder_1.layers.0.self_attn.in_proj_bias"] = torch.zeros(96)
    meta = {"mmseg_version": "0.24.1", "CLASSES": ("cat", "dog"), "epoch": 3, "lr": np.float64(1e-4), "n": np.int64(3)}
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {0: {"step": 1}}, "param_groups": []}}


def make(recipe, path, change=lambda checkpoint: checkpoint):
    """Save a checkpoint of a fresh model; returns the model."""
    torch.manual_seed(1)
    visual = load_clip(recipe.clip, weights=recipe.clip_weights).visual
    model = build_segmenter(visual, recipe.segmenter_config()).eval()
    torch.save(change(checkpoint_of(model)), path)
    return model


# what test_weights.py tests
pytestmark = pytest.mark.filterwarnings("ignore:.*(stripped from|converted from)")


def prefixed(checkpoint):
    return {**checkpoint, "state_dict": {f"module.{name}": t for name, t in checkpoint["state_dict"].items()}}


def bare(checkpoint):
    return checkpoint["state_dict"]


def halved(checkpoint):
    frozen = {name for name in checkpoint["state_dict"] if name.startswith("backbone.") and "prompt" not in name}
    state = {name: t.half() if name in frozen else t for name, t in checkpoint["state_dict"].items()}
    return {**checkpoint, "state_dict": state}


@pytest.mark.parametrize("method", ["zegclip", "spt-seg"])
@pytest.mark.parametrize("form", [dict, prefixed, bare])
def test_the_converted_model_answers_as_the_released_one(clips, tmp_path, method, form):
    recipe = a_recipe(clips, method)
    model = make(recipe, tmp_path / "released.pth", form)
    report = convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe)
    visual = load_clip(recipe.clip).visual
    ours = load_segmenter(tmp_path / "run/model.safetensors", visual, clip=recipe.clip)
    theirs, left_out = read_segmenter(checkpoint_of(model)["state_dict"], image_size=48)
    images, text = torch.randn(2, 3, 48, 48), torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(ours(images, text), model(images, text))
        assert torch.allclose(ours(images, text), theirs(images, text), atol=1e-5)
    assert report["method"] == method and report["tensors read"] == len(model.trained_tensors())
    assert sum(report["left out"].values()) == len(visual.state_dict()) + len(left_out) + 2 * (form is not bare)


def test_the_run_folder_can_be_evaluated(clips, tmp_path):
    recipe = a_recipe(clips, "spt-seg")
    model = make(recipe, tmp_path / "released.pth")
    report = convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe)
    assert load_recipe(tmp_path / "run/recipe.yaml") == recipe
    loaded = next(part for part in load_model(recipe, report["weights"]) if isinstance(part, type(model)))
    assert loaded.config == recipe.segmenter_config()
    assert read_segmenter_file(report["weights"])[1]["dataset"] == recipe.dataset
    text = summarise_conversion(report)
    assert "4 prompts per block" in text and "2 decoder layers" in text and "optimiser" in text and clips[0] in text


def test_by_command(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = a_recipe(clips, "zegclip")
    make(recipe, "released.pth")
    Path("row.yaml").write_text(recipe_text(recipe))
    assert main(["convert", "released.pth", "run", "--recipe", "row.yaml", "num_prompts=5"]) == 1
    assert "num_prompts=4" in capsys.readouterr().err and not Path("run").exists()
    assert main(["convert", "released.pth", "run", "--recipe", "row.yaml"]) == 0
    assert "zegclip, 4 prompts per block" in capsys.readouterr().out
    assert main(["evaluate", "run", "--quiet"]) == 0
    assert json.loads(Path("run/evaluation-glyphs-20.json").read_text())["metrics"]["pAcc"] is not None


def test_half_precision_counts_as_the_same_clip_and_training_does_not(clips, tmp_path):
    recipe = a_recipe(clips, "zegclip")
    make(recipe, tmp_path / "half.pth", halved)
    assert convert_checkpoint(tmp_path / "half.pth", tmp_path / "run", recipe=recipe)["compared with"] == clips[0]

    def tune(checkpoint):
        name = "backbone.transformer.resblocks.1.mlp.c_fc.weight"
        tuned = checkpoint["state_dict"][name] + 2e-4 * torch.randn(256, 64).sign()
        return {"state_dict": {**checkpoint["state_dict"], name: tuned}}

    make(recipe, tmp_path / "tuned.pth", tune)
    with pytest.raises(UserError, match=r"tuned\.pth: backbone\.transformer\.resblocks\.1\.mlp\.c_fc\.weight differs"):
        convert_checkpoint(tmp_path / "tuned.pth", tmp_path / "tuned", recipe=recipe)
    assert not (tmp_path / "tuned").exists()


def test_another_clip_is_refused_unless_unchecked(clips, tmp_path):
    recipe = a_recipe(clips, "zegclip")
    make(recipe, tmp_path / "released.pth")
    other = recipe.model_copy(update={"clip": clips[1]})
    with pytest.raises(UserError, match="backbone.class_embedding differs"):
        convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=other)
    report = convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=other, unchecked=True)
    assert report["compared with"] is None and "NOT compared" in summarise_conversion(report)


def test_clip_that_is_not_on_this_computer(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("SPTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    recipe = a_recipe(clips, "zegclip")
    make(recipe, tmp_path / "released.pth")
    absent = recipe.model_copy(update={"clip": "ViT-B-16-quickgelu", "clip_weights": "openai"})
    with pytest.raises(UserError, match=r"fetch https.*save it as .*cache.*--unchecked"):
        convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=absent)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_prompts": 7}, "set num_prompts=4"),
        ({"decoder_layers": 3}, "set decoder_layers=2"),
        ({"method": "zegclip"}, "a recipe of spt-seg"),
        ({"spectral_blocks": "1-3"}, "set spectral_blocks=1-2"),
        ({"head_split": "paper"}, "set head_split=code"),
        ({"image_size": 64}, "trained at 48 pixels"),
    ],
)
def test_a_recipe_of_another_model_is_refused(clips, tmp_path, settings, words):
    recipe = a_recipe(clips, "spt-seg")
    make(recipe, tmp_path / "released.pth")
    with pytest.raises(UserError, match=words):
        convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe.model_copy(update=settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({FIRST_PROMPTS: None}, "prompt_embeddings"),
        ({OTHER_PROMPTS: None}, "shallow"),
        ({"backbone.prompt_proj.weight": None}, "without projection"),
        ({"backbone.fpn1.0.weight": torch.zeros(2)}, "fpn1.0.weight"),
        ({"neck.conv.weight": torch.zeros(2)}, "neck.conv.weight"),
        ({"decode_head.q_proj.weight": torch.zeros(3, 3)}, "query_projection|q_proj"),
        ({"decode_head.q_proj.bias": None}, "query_projection.bias"),
    ],
)
def test_unsupported_and_incomplete_models_are_named(clips, tmp_path, changes, words):
    recipe = a_recipe(clips, "zegclip")

    def change(checkpoint):
        state = {**checkpoint["state_dict"], **changes}
        return {"state_dict": {name: tensor for name, tensor in state.items() if tensor is not None}}

    make(recipe, tmp_path / "released.pth", change)
    with pytest.raises(UserError, match=words) as error:
        convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe)
    assert "\n" not in str(error.value)


class Trap:
    """What a malicious checkpoint would hold: loading it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"meta": Trap(tmp_path / "trapped"), "state_dict": {"w": torch.zeros(1)}}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth: holds a Python object"):
        load_plainly(tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pth"):
        load_plainly(tmp_path / "broken.pth")
    with pytest.raises(UserError, match="absent.pth"):
        load_plainly(tmp_path / "absent.pth")
    with pytest.raises(UserError):
        load_plainly(tmp_path)


def test_a_truncated_checkpoint_is_named(clips, tmp_path):
    make(a_recipe(clips, "zegclip"), tmp_path / "released.pth")
    whole = (tmp_path / "released.pth").read_bytes()
    (tmp_path / "released.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"released\.pth"):
        load_plainly(tmp_path / "released.pth")


@pytest.mark.parametrize("content", [[1, 2], {"meta": {}}, {"state_dict": {}}, {"state_dict": {"a": 1}}, torch.ones(1)])
def test_files_without_weights_are_refused(clips, tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth: does not hold a dictionary of tensors"):
        convert_checkpoint(tmp_path / "odd.pth", tmp_path / "run", recipe=a_recipe(clips, "zegclip"))


def test_a_folder_of_something_else_stays_as_it_is(clips, tmp_path):
    recipe = a_recipe(clips, "zegclip")
    make(recipe, tmp_path / "released.pth")
    for name in ("model.safetensors", "recipe.yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: exists"):
            convert_checkpoint(tmp_path / "released.pth", tmp_path / name, recipe=recipe)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
        assert (tmp_path / name / name).read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        convert_checkpoint(tmp_path / "released.pth", tmp_path / "released.pth", recipe=recipe)
    first = convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe)
    assert convert_checkpoint(tmp_path / "released.pth", tmp_path / "run", recipe=recipe) == first


def test_about_equal_scales_with_the_tensor():
    for scale in (1e-3, 1.0, 1e3):
        tensor = scale * torch.randn(100, generator=torch.Generator().manual_seed(0))
        assert about_equal(tensor, tensor * (1 + 4e-4)) and not about_equal(tensor, tensor * 1.01)
    assert not about_equal(torch.zeros(3), torch.zeros(4))


@pytest.fixture(scope="module")
def full_clip():
    return load_clip("ViT-B-16-quickgelu", weights="random")


@pytest.mark.parametrize("kind, prompts", [("zegclip", 10), ("zegclip", 100), ("spt", 10), ("spt", 100)])
def test_checkpoints_of_full_size(full_clip, tmp_path, monkeypatch, kind, prompts):
    """Every name and shape of the releases; CLIP's part in half precision, unused parameters as one stored number."""
    released = json.loads(FULL_SCALE.read_text())[kind]
    shapes = dict(released["voc_10_tokens"]["parameters"])
    shapes |= released["coco_100_tokens"]["parameters_that_differ_from_voc"] if prompts == 100 else {}
    ours, frozen = dict(full_clip.visual.state_dict()), lambda name: name.removeprefix("backbone.")
    ours["positional_embedding"] = interpolate_position_embedding(ours["positional_embedding"], (32, 32))
    state = {
        name: ours[frozen(name)].half() if frozen(name) in ours else torch.randn(()).expand(shape)
        for name, shape in shapes.items()
    }
    state |= {name: torch.zeros(shape) for name, shape in released["voc_10_tokens"]["buffers"].items()}
    torch.save({"meta": {"iter": 20000}, "state_dict": state, "optimizer": {}}, tmp_path / "full.pth")
    monkeypatch.setattr("sptseg.releases.convert.load_clip", lambda *_, **__: full_clip)
    method = {"zegclip": "zegclip", "spt": "spt-seg"}[kind]
    recipe = Recipe(dataset="voc", method=method, clip="ViT-B-16-quickgelu", clip_weights="random", num_prompts=prompts)
    report = convert_checkpoint(tmp_path / "full.pth", tmp_path / "run", recipe=recipe)
    used = released["voc_10_tokens"]["effective_trainable"]["total"] + (prompts - 10) * 12 * 768
    assert report["values read"] == used and report["method"] == method
    left_out = [name for name in shapes if frozen(name) not in ours and name_is_unused(name, released)]
    assert sum(report["left out"].values()) == len(ours) + len(left_out) + 1 + 2  # a buffer, meta, optimizer
    model = load_segmenter(
        report["weights"], full_clip.visual, clip=recipe.clip, expected=recipe.segmenter_config()
    ).trained_tensors()
    assert torch.equal(model[PROMPTS][1:], state[OTHER_PROMPTS])
    assert torch.equal(model["decoder.query_projection.weight"], state["decode_head.q_proj.weight"])


def name_is_unused(name, released):
    return name in released["voc_10_tokens"]["never_used_by_the_loss"]["names"]


@pytest.mark.parametrize("kind", ["zegclip", "spt"])
def test_every_name_of_the_releases_is_read_or_has_a_reason(kind):
    from sptseg.releases.names import translate_state

    released = json.loads(FULL_SCALE.read_text())[kind]["voc_10_tokens"]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in released["parameters"].items()}
    translation = translate_state(state)
    assert translation.left_out.keys() == set(released["never_used_by_the_loss"]["names"])
    assert max(int(LAYER.fullmatch(name)[2]) for name in state if LAYER.fullmatch(name)) == 2
