"""CLIPs from Hugging Face: the layout of transformers, folders, and the hub without a network."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from sptseg.core import UserError
from sptseg.models import huggingface
from sptseg.models.clip import clip_config, load_clip
from sptseg.models.huggingface import open_clip_config, open_clip_weights, read_config
from sptseg.models.weights import load_exactly, read_weights

SAVED = Path(__file__).resolve().parent / "huggingface_clip"
CONTENT = json.loads((SAVED / "config.json").read_text())


def saved_model(change=dict):
    model = open_clip.CLIP(**open_clip_config(change(CONTENT))).eval()
    load_exactly(model.state_dict(), open_clip_weights(read_weights(SAVED / "model.safetensors")), SAVED)
    return model


@torch.no_grad()
def errors(model):
    """The largest differences from what transformers computed, relative to the largest values."""
    vectors = load_file(SAVED / "vectors.safetensors")
    ours = {"image": model.encode_image(vectors["images"]), "text": model.encode_text(vectors["tokens"])}
    theirs = {kind: vectors[f"{kind}_embeddings"] for kind in ours}
    return [((ours[kind] - theirs[kind]).abs().max() / theirs[kind].abs().max()).item() for kind in ours]


def test_the_embeddings_are_those_of_transformers():
    assert max(errors(saved_model())) < 1e-5


def with_settings(part, **settings):
    return lambda content: {**content, part: {**content[part], **settings}}


@pytest.mark.parametrize(
    ("change", "image", "text"),
    [
        (with_settings("vision_config", num_attention_heads=4), True, False),
        (with_settings("text_config", num_attention_heads=2), False, True),
    ],
)
def test_the_number_of_heads_comes_from_the_configuration(change, image, text):
    found = errors(saved_model(change))
    assert [error > 1e-3 for error in found] == [image, text]


def test_the_activation_comes_from_the_configuration():
    def gelu(content):
        both = (with_settings(f"{part}_config", hidden_act="gelu") for part in ("vision", "text"))
        for change in both:
            content = change(content)
        return content

    assert "quick_gelu" not in open_clip_config(gelu(CONTENT))
    assert min(errors(saved_model(gelu))) > 1e-4


def test_values_that_transformers_leaves_out_are_its_defaults():
    config = open_clip_config({"model_type": "clip", "vision_config": {"patch_size": 16}, "text_config": {}})
    known = open_clip.get_model_config("ViT-B-16-quickgelu")
    for part, kind in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        assert kind(**config[part]) == kind(**known[part])
    assert (config["embed_dim"], config["quick_gelu"]) == (known["embed_dim"], known["quick_gelu"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: {**content, "model_type": "siglip"}, "model_type 'siglip'"),
        (with_settings("text_config", layer_norm_eps=1e-6), "text_config: layer_norm_eps 1e-06 is not supported"),
        (with_settings("vision_config", num_channels=4), "num_channels 4"),
        (with_settings("vision_config", hidden_act="gelu_new"), "hidden_act 'gelu_new'"),
        (with_settings("vision_config", hidden_act="gelu"), "different activations"),
        (with_settings("vision_config", num_attention_heads=0), "ZeroDivisionError"),
        (lambda content: {**content, "vision_config": [1]}, "not the configuration of a CLIP"),
        (lambda content: [1], "not the configuration of a CLIP"),
        (lambda content: {}, "model_type None"),
    ],
)
def test_other_architectures_are_refused_in_one_line(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(change(CONTENT)))
    with pytest.raises(UserError, match=words) as error:
        read_config(tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(error.value)


# from here on, a CLIP with the whole vocabulary

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
PARTS |= {"attn.out_proj": "self_attn.out_proj"}
NAMES = {
    **{"visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.conv1": "vision_model.embeddings."},
    **{"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"},
    **{"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"},
}
NAMES["visual.conv1"] += "patch_embedding"


def layout_of_transformers(model):
    """The weights of an open_clip model as transformers would save them."""
    theirs = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    for name, value in model.state_dict().items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        if "resblocks" in name:
            index, _, part = name.split("resblocks.")[1].partition(".")
            prefix = f"{tower}.encoder.layers.{index}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                thirds = zip("qkv", value.chunk(3), strict=True)
                theirs |= {f"{prefix}self_attn.{letter}_proj.{kind}": third.clone() for letter, third in thirds}
            else:
                stem, _, kind = part.rpartition(".")
                theirs[f"{prefix}{PARTS[stem]}.{kind}"] = value
        elif name in ("visual.proj", "text_projection"):
            theirs[{"visual.proj": "visual_projection.weight"}.get(name, f"{name}.weight")] = value.T.contiguous()
        elif name.endswith("positional_embedding"):
            theirs[f"{tower}.embeddings.position_embedding.weight"] = value
        else:
            stem = next((stem for stem in NAMES if name.startswith(stem)), None)
            theirs[name if stem is None else NAMES[stem] + name[len(stem) :]] = value
    return theirs


def hugging_face_config():
    vision, text = CONFIG["vision_cfg"], CONFIG["text_cfg"]
    return {
        "model_type": "clip",
        "projection_dim": CONFIG["embed_dim"],
        "vision_config": {
            **{"hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "num_attention_heads": 2},
            **{"num_hidden_layers": vision["layers"], "image_size": 32, "patch_size": 8},
        },
        "text_config": {
            **{"hidden_size": text["width"], "intermediate_size": 4 * text["width"], "num_attention_heads": 2},
            **{"num_hidden_layers": text["layers"], "max_position_embeddings": 12},
        },
    }


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).eval()


@pytest.fixture(params=["transformers, safetensors", "transformers, bin", "open_clip, safetensors", "open_clip, bin"])
def folder(request, original, tmp_path):
    layout, kind = request.param.split(", ")
    theirs = layout == "transformers"
    config = hugging_face_config() if theirs else {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0, 0, 0]}}
    (tmp_path / ("config.json" if theirs else "open_clip_config.json")).write_text(json.dumps(config))
    weights = layout_of_transformers(original) if theirs else original.state_dict()
    name = ("" if theirs else "open_clip_") + ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    (save_file if kind == "safetensors" else torch.save)(weights, tmp_path / name)
    return tmp_path


def check_equal(clip, original):
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in clip.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(clip.encode_text(["a red cat"]), original.encode_text(clip.tokenizer(["a red cat"])))
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(clip.visual(images), original.visual(images))


def test_a_folder_is_a_clip(folder, original):
    check_equal(load_clip(str(folder)), original)


class Hub:
    """Answers like the hub, from folders on this computer; without a network, only what was asked before."""

    def __init__(self, folders, cache):
        self.folders, self.cache, self.online, self.downloads = folders, cache, True, 0

    def __call__(self, repository, name):
        cached = self.cache / f"{repository.replace('/', '--')}-{name}"
        if cached.is_file():
            return str(cached)
        if not self.online:
            raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache. Check your connection.")
        if repository not in self.folders:
            raise not_found(RepositoryNotFoundError, "Repository Not Found for url.")
        if not (self.folders[repository] / name).is_file():
            raise not_found(EntryNotFoundError, "Entry Not Found for url.")
        self.downloads += 1
        return shutil.copy(self.folders[repository] / name, cached)


def not_found(kind, text):
    """An error as the library raises it, whatever its version."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def test_a_repository_of_the_hub_is_a_clip_and_is_downloaded_once(folder, original, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    hub = Hub({"org/name": folder}, tmp_path / "cache")
    monkeypatch.setattr(huggingface, "hf_hub_download", hub)
    check_equal(load_clip("hf-hub:org/name"), original)
    assert hub.downloads == 2
    hub.online = False
    clip = load_clip("hf-hub:org/name")
    check_equal(clip, original)
    assert hub.downloads == 2 and clip.name == "hf-hub:org/name"


@pytest.mark.parametrize("online", [True, False])
def test_a_repository_that_cannot_be_fetched_says_what_to_save_where(tmp_path, monkeypatch, online):
    hub = Hub({}, tmp_path)
    hub.online = online
    monkeypatch.setattr(huggingface, "hf_hub_download", hub)
    remedy = (
        "save open_clip_config.json or config.json of https://huggingface.co/org/name in a folder and name the folder"
    )
    with pytest.raises(UserError, match=f"clip 'hf-hub:org/name': no file could be fetched .*; {remedy}") as error:
        load_clip("hf-hub:org/name", weights="random")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:no blanks/here"])
def test_impossible_names_of_repositories_are_refused(name):
    with pytest.raises(UserError, match="no file could be fetched"):
        clip_config(name)


def test_a_file_in_the_layout_of_transformers_serves_a_named_architecture(original, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(CONFIG))
    save_file(layout_of_transformers(original), tmp_path / "own/theirs.safetensors")
    check_equal(load_clip(str(tmp_path / "own"), weights=tmp_path / "own/theirs.safetensors"), original)


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("vision_config", {"num_attention_heads": 4}, "vision heads 4 instead of 2"),
        ("text_config", {"num_attention_heads": 4}, "text heads 4 instead of 2"),
        (None, {"hidden_act": "gelu"}, "QuickGELU False instead of True"),
    ],
)
def test_a_configuration_beside_the_weights_must_agree(original, tmp_path, part, settings, words):
    for name in ("own", "theirs"):
        (tmp_path / name).mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(CONFIG))
    content = hugging_face_config()
    for name in [part] if part else ["vision_config", "text_config"]:
        content[name] |= settings
    (tmp_path / "theirs/config.json").write_text(json.dumps(content))
    save_file(layout_of_transformers(original), tmp_path / "theirs/model.safetensors")
    with pytest.raises(UserError, match=f"config.json beside it says {words}; name its folder as clip, not '.*/own'"):
        load_clip(str(tmp_path / "own"), weights=tmp_path / "theirs/model.safetensors")


def test_a_configuration_of_something_else_beside_the_weights_is_no_hindrance(original, tmp_path):
    for name in ("own", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "elsewhere/config.json").write_text('{"learning_rate": 1}')
    save_file(original.state_dict(), tmp_path / "elsewhere/model.safetensors")
    check_equal(load_clip(str(tmp_path / "own"), weights=tmp_path / "elsewhere/model.safetensors"), original)


@pytest.mark.parametrize("letter", "qkv")
def test_a_missing_projection_is_named(original, tmp_path, letter):
    weights = layout_of_transformers(original)
    del weights[f"vision_model.encoder.layers.1.self_attn.{letter}_proj.weight"]
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config()))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing, such as visual.transformer.resblocks.1.attn.in_proj_weight"):
        load_clip(str(tmp_path))


def test_another_vocabulary_is_refused(tmp_path):
    shutil.copytree(SAVED, tmp_path / "clip")
    with pytest.raises(UserError, match="has a vocabulary of 64 tokens, not CLIP's 49408"):
        load_clip(str(tmp_path / "clip"))
