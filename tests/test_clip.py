"""Loading CLIP, its traps, and the text embeddings of classes."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sptseg.core import UserError
from sptseg.data.label_sets import LabelSet, load_label_set
from sptseg.models import clip as clip_module
from sptseg.models import weights as weights_module
from sptseg.models.clip import (
    ClipModel,
    fetch_weights,
    fingerprint,
    interpolate_position_embedding,
    load_clip,
)
from sptseg.models.text import SCENE_TEMPLATES, SINGLE_TEMPLATE, cache_file, class_embeddings, load_text_embeddings
from sptseg.models.weights import ScriptedModule, module_tensors, read_weights

SHARED = Path(__file__).resolve().parents[2] / "shared"
PETS = LabelSet("pets", ("red cat", "blue dog", "green bird"), templates=SCENE_TEMPLATES)
OPENAI_LIKE = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny():
    return load_clip("glyph-clip", weights="random")


def test_random_weights_are_loud_reproducible_and_leave_the_global_generator_alone(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load_clip("glyph-clip", weights="random")
    assert torch.equal(before, torch.get_rng_state())
    assert "RANDOM" in tiny.name and again.weights_hash == tiny.weights_hash


def test_the_model_is_frozen_and_knows_its_sizes(tiny):
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert not tiny.model.training and (tiny.patch_size, tiny.embed_dim) == (8, 128)
    assert tiny.encode_text(["a red cat"]).shape == (1, tiny.embed_dim)


def test_the_packaged_weights_load(tmp_path):
    clip = load_clip("glyph-clip")
    known = LabelSet("known", ("red cat", "blue heart", "green star"))
    assert clip.name == "glyph-clip" and class_embeddings(clip, known, cache_dir=tmp_path).shape == (3, clip.embed_dim)


def test_texts_are_encoded_as_open_clip_does_in_any_batch_size(tiny):
    texts = ["a red cat", "two blue dogs", "rain"]
    expected = tiny.model.encode_text(open_clip.SimpleTokenizer(context_length=48)(texts))
    assert torch.allclose(tiny.encode_text(texts, batch_size=2), expected, atol=1e-5)


def test_a_text_that_would_be_cut_off_is_refused(tiny):
    with pytest.raises(UserError, match="longer than the 46 tokens"):
        tiny.encode_text(["very " * 60 + "long"])


def test_class_embeddings_follow_the_definition(tiny, tmp_path):
    embeddings = class_embeddings(tiny, PETS, cache_dir=tmp_path)
    for name, embedding in zip(PETS.classes, embeddings, strict=True):
        sentences = tiny.encode_text([template.format(name) for template in PETS.templates])
        mean = sum(sentence / sentence.norm() for sentence in sentences) / len(PETS.templates)
        assert torch.allclose(embedding, mean / mean.norm(), atol=1e-6)
    assert embeddings.dtype == torch.float32 and torch.allclose(embeddings.norm(dim=1), torch.ones(3))


def test_a_cache_hit_does_not_run_the_text_encoder(tiny, tmp_path, monkeypatch):
    first = class_embeddings(tiny, PETS, cache_dir=tmp_path)
    monkeypatch.setattr(ClipModel, "encode_text", lambda *_: pytest.fail("the text encoder ran"))
    assert torch.equal(first, class_embeddings(tiny, PETS, cache_dir=tmp_path))
    with pytest.raises(pytest.fail.Exception):
        class_embeddings(tiny, LabelSet("pets", ("red cat",)), cache_dir=tmp_path)


def test_the_cache_key_depends_on_weights_templates_and_names_only(tiny):
    other = load_clip("glyph-clip")
    files = [
        cache_file(tiny, PETS),
        cache_file(other, PETS),
        cache_file(tiny, LabelSet("pets", PETS.classes)),
        cache_file(tiny, LabelSet("pets", PETS.classes[::-1], templates=PETS.templates)),
    ]
    assert len(set(files)) == 4
    assert cache_file(tiny, LabelSet("renamed", PETS.classes, (1,), PETS.templates)) == files[0]


def test_templates_kept_apart_have_a_key_of_their_own_and_average_to_the_class_embeddings(tiny, tmp_path):
    averaged, apart = (class_embeddings(tiny, PETS, cache_dir=tmp_path, apart=kind) for kind in (False, True))
    assert apart.shape == (3, len(SCENE_TEMPLATES), tiny.embed_dim) and averaged.shape == (3, tiny.embed_dim)
    assert torch.equal(F.normalize(apart.mean(1), dim=-1), averaged)
    for kind, first in ((False, averaged), (True, apart)):
        assert torch.equal(class_embeddings(tiny, PETS, cache_dir=tmp_path, apart=kind), first), "from the cache"
    assert cache_file(tiny, PETS, tmp_path) != cache_file(tiny, PETS, tmp_path, apart=True)


def test_templates_that_cannot_be_compared_are_refused(tiny):
    for templates, message in ((("a {}.",), "the only one"), (("a {}.", "the {}.", "a {}."), "'a {}.' and 'a {}.'")):
        labels = LabelSet("pets", PETS.classes, templates=templates)
        with pytest.raises(UserError, match=message):
            class_embeddings(tiny, labels, apart=True)


@pytest.mark.parametrize("suffix", [".npy", ".pth"])
def test_embeddings_by_template_from_a_file(tmp_path, suffix):
    array, file = np.random.default_rng(0).normal(size=(3, 15, 128)).astype(np.float16), tmp_path / f"text{suffix}"
    np.save(file, array) if suffix == ".npy" else torch.save(torch.from_numpy(array), file)
    loaded = load_text_embeddings(file, PETS, 128, apart=True)
    assert torch.allclose(loaded, F.normalize(torch.from_numpy(array).float(), dim=-1))
    for wrong in (LabelSet("pets", PETS.classes), LabelSet("more", (*PETS.classes, "x"), templates=SCENE_TEMPLATES)):
        with pytest.raises(UserError, match=r"holds \(3, 15, 128\) float"):
            load_text_embeddings(file, wrong, 128, apart=True)
    with pytest.raises(UserError, match="needs one row of floats for each of 3 classes$"):
        load_text_embeddings(file, PETS, 128)


def test_a_file_of_several_tensors_is_no_array(tmp_path):
    torch.save({"text": torch.zeros(3, 128)}, tmp_path / "text.pth")
    with pytest.raises(UserError, match="does not hold one tensor"):
        load_text_embeddings(tmp_path / "text.pth", PETS)


def test_a_damaged_cache_file_is_replaced(tiny, tmp_path):
    first = class_embeddings(tiny, PETS, cache_dir=tmp_path)
    cache_file(tiny, PETS, tmp_path).write_bytes(b"half a fi")
    assert torch.equal(first, class_embeddings(tiny, PETS, cache_dir=tmp_path))
    assert cache_file(tiny, PETS, tmp_path).stat().st_size > 100


def test_the_cache_folder_can_be_chosen_by_an_environment_variable(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SPTSEG_CACHE", str(tmp_path))
    class_embeddings(tiny, PETS)
    assert list(tmp_path.rglob("*.safetensors")) == [cache_file(tiny, PETS)]


def test_a_cache_that_cannot_be_written_only_warns(tiny, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert class_embeddings(tiny, PETS, cache_dir=tmp_path / "file").shape == (3, 128)


def test_openai_weights_need_the_quickgelu_name():
    with pytest.raises(UserError, match="use 'ViT-B-16-quickgelu'"):
        load_clip("ViT-B-16", weights="openai")
    with pytest.raises(UserError, match="use 'ViT-B-16'$"):
        clip_module.check_activation("ViT-B-16-quickgelu", True, "datacomp_xl_s13b_b90k", False)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "ViT-B-17", "no/such/folder"])
def test_unknown_or_unsuitable_models_are_refused(name):
    with pytest.raises(UserError, match=name):
        load_clip(name, weights="random")


def test_missing_weights_name_the_choices():
    with pytest.raises(UserError, match="no weights named; use one of the tags openai"):
        load_clip("ViT-B-16-quickgelu")
    with pytest.raises(UserError, match="'opanai' are neither a file nor a known tag"):
        load_clip("ViT-B-16-quickgelu", weights="opanai")
    with pytest.raises(UserError, match="'/nowhere/model.pt' are neither a file"):
        load_clip("glyph-clip", weights="/nowhere/model.pt")


def test_offline_the_message_names_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load_clip("ViT-B-16-quickgelu", weights="openai", cache_dir=tmp_path)
    text = str(error.value)
    assert str(tmp_path / "ViT-B-16-quickgelu-openai.pt") in text and "/ViT-B-16.pt" in text and "\n" not in text
    with pytest.raises(UserError) as error:
        fetch_weights("ViT-B-16", "laion2b_s34b_b88k", tmp_path)
    assert str(tmp_path / "ViT-B-16-laion2b_s34b_b88k.safetensors") in str(error.value)


def test_a_file_in_that_place_is_used_without_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: pytest.fail("tried to download"))
    file = tmp_path / "ViT-B-16-laion2b_s34b_b88k.safetensors"
    file.write_bytes(b"")
    assert fetch_weights("ViT-B-16", "laion2b_s34b_b88k", tmp_path) == file


def test_a_damaged_copy_of_openais_file_is_found_out(tmp_path):
    file = tmp_path / "ViT-B-16-quickgelu-openai.pt"
    file.write_bytes(b"half a fi")
    with pytest.raises(UserError, match="is damaged"):
        fetch_weights("ViT-B-16-quickgelu", "openai", tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bare.pt", "wrapped.pt"])
def test_weights_can_come_in_several_forms(tiny, tmp_path, form):
    weights = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    file = tmp_path / f"model.{form}"
    if form == "safetensors":
        save_file(weights, file)
    elif form == "bare.pt":
        torch.save(weights, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, file)
    assert load_clip("glyph-clip", weights=file).weights_hash == tiny.weights_hash


class Holder(torch.nn.Module):
    """A tree of tensors by name, such as OpenAI's archives contain."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def archive_like_openais(model, file):
    root = Holder()
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
    numbers = {name: torch.tensor(size) for name, size in sizes.items()}
    for name, value in {**model.state_dict(), **numbers}.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Holder())
            node = node._modules[part]
        node.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.trace(root, torch.zeros(1)).save(str(file))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_archives_are_read_as_data_and_need_quickgelu(tmp_path, monkeypatch):
    model = open_clip.CLIP(**OPENAI_LIKE).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # as precise as OpenAI's files
    file = tmp_path / "ViT-B-16.pt"
    archive_like_openais(model, file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("code was loaded"))
    monkeypatch.delattr(open_clip, "load_openai_model", raising=False)  # later versions of open_clip lack it
    weights = read_weights(file)
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="use 'ViT-B-16-quickgelu'"):
        load_clip("ViT-B-16", weights=file)


def test_causal_masks_are_no_weights():
    block, root = ScriptedModule(), ScriptedModule()
    block.attn_mask, block.weight, root.training, root.block = torch.ones(2, 2), torch.ones(2), True, block
    assert [name for name, _ in module_tensors(root)] == ["block.weight"]


class Trap:
    """Loading it with Python's own unpickler creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("members", [{"data.pkl": None}, {"data.pkl": b"\x80\x02"}, {"data.pkl": b"junk"}, {"a": b""}])
def test_damaged_and_malicious_archives_are_refused(tmp_path, members):
    trapped = pickle.dumps(Trap(tmp_path / "trapped"))
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/code/__torch__.py", "")
        for name, content in members.items():
            archive.writestr(f"model/{name}", trapped if content is None else content)
    with pytest.raises(UserError, match=r"model\.pt: cannot be read as weights \("):
        read_weights(tmp_path / "model.pt")
    assert not (tmp_path / "trapped").exists()


def test_a_truncated_archive_is_refused(tmp_path):
    archive_like_openais(open_clip.CLIP(**OPENAI_LIKE), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"half\.pt: cannot be read"):
        read_weights(tmp_path / "half.pt")


@pytest.mark.parametrize("content", [[1], {"state_dict": [1]}, {"a": 1}, {}, torch.ones(2)])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: does not hold a dictionary of tensors"):
        read_weights(tmp_path / "model.pt")


def test_a_defect_is_not_reported_as_an_unreadable_file(tiny, tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights_module, "load_file", lambda path: path.no_such_attribute)
    with pytest.raises(AttributeError):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weights: weights.pop("visual.proj"), "1 missing, such as visual.proj"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unexpected, such as extra"),
        (lambda weights: weights.update({"visual.proj": torch.zeros(3, 3)}), "1 of another shape, such as visual.proj"),
    ],
)
def test_weights_that_do_not_fit_exactly_are_refused(tiny, tmp_path, change, text):
    weights = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=text):
        load_clip("glyph-clip", weights=tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_unreadable_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
        load_clip("glyph-clip", weights=tmp_path / name)


def test_the_fingerprint_ignores_precision_and_temperature_but_no_weight(tiny):
    import copy

    other = copy.deepcopy(tiny.model)
    other.logit_scale.data += 1
    assert fingerprint(other) == tiny.weights_hash
    other.visual.proj.data[0, 0] += 1
    assert fingerprint(other) != tiny.weights_hash


def test_interpolation_keeps_the_cls_row_the_trained_grid_and_the_orientation():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    position = torch.cat([torch.full((1, 2), 9.0), torch.stack([rows, columns], -1).flatten(0, 1)])
    assert torch.equal(interpolate_position_embedding(position, (6, 6)), position)
    resized = interpolate_position_embedding(position, (12, 3))
    assert resized.shape == (37, 2) and torch.equal(resized[0], position[0])
    maps = resized[1:].view(12, 3, 2)
    assert (maps[:, 0, 0] - maps[:, 2, 0]).abs().max() < 1e-6 and (maps[1:, 0, 0] >= maps[:-1, 0, 0]).all()
    assert maps[0, :, 1].tolist() == [0.5, 2.5, 4.5], "centres of pixels, align_corners=False"


def test_interpolation_equals_torch_on_maps():
    position = torch.randn(1 + 49, 5)
    maps = position[1:].reshape(7, 7, 5).permute(2, 0, 1)[None]
    expected = F.interpolate(maps, (10, 13), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).reshape(-1, 5)
    assert torch.allclose(interpolate_position_embedding(position, (10, 13))[1:], expected, atol=1e-6)


def test_the_templates_in_code_are_those_in_the_files():
    assert load_label_set("voc").templates == SINGLE_TEMPLATE
    assert set(load_label_set("coco-stuff").templates) == set(SCENE_TEMPLATES) and len(SCENE_TEMPLATES) == 15


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 128), np.float16), r"holds \(4, 128\) float16"),
        (np.ones((3, 64), np.float16), "rows have width 64, this CLIP 128"),
        (np.ones(3, np.float32), r"holds \(3,\) float32"),
        (np.ones((3, 128), np.int64), "int64"),
        (np.zeros((3, 128), np.float32), "zero or not finite"),
        (np.full((3, 128), np.nan, np.float32), "zero or not finite"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_text_embeddings_of_the_wrong_form_are_refused(tmp_path, array, message):
    np.save(tmp_path / "text.npy", array)
    with pytest.raises(UserError, match=message):
        load_text_embeddings(tmp_path / "text.npy", PETS, 128)


def test_text_embeddings_survive_half_precision(tmp_path):
    rows = F.normalize(torch.randn(3, 128), dim=-1)
    np.save(tmp_path / "text.npy", rows.numpy().astype(np.float16))
    loaded = load_text_embeddings(tmp_path / "text.npy", PETS, 128)
    assert loaded.dtype == torch.float32 and torch.allclose(loaded, rows, atol=1e-3)
    assert torch.allclose(loaded.norm(dim=1), torch.ones(3))
    with pytest.raises(UserError, match="check the path"):
        load_text_embeddings(tmp_path / "none.npy", PETS)


RELEASED = [("voc12_single", "voc"), ("coco_multi", "coco-stuff")]


@pytest.mark.skipif(not (SHARED / "text_embeddings").exists(), reason="released text embeddings are not here")
@pytest.mark.parametrize(("file", "name"), RELEASED)
def test_released_text_embeddings_load(file, name):
    labels = load_label_set(name)
    embeddings = load_text_embeddings(SHARED / "text_embeddings" / f"{file}.npy", labels, 512)
    assert embeddings.shape == (len(labels.classes), 512)
    similarity = embeddings @ embeddings.T - 2 * torch.eye(len(embeddings))
    if name == "voc":  # the order of rows must be that of the names: the two are related as their words are
        assert labels.classes[similarity[labels.classes.index("cat")].argmax()] == "dog"
        assert labels.classes[similarity[labels.classes.index("cow")].argmax()] in ("horse", "sheep")
        assert labels.classes[similarity[labels.classes.index("bicycle")].argmax()] == "motorbike"
    else:
        pairs = [("wall-tile", "wall-stone"), ("fork", "knife"), ("floor-wood", "floor-tile"), ("knife", "fork")]
        for one, other in pairs:
            nearest = similarity[labels.classes.index(one)].topk(6).indices.tolist()
            assert other in [labels.classes[index] for index in nearest]


@pytest.mark.skipif(not (SHARED / "text_embeddings").exists(), reason="released text embeddings are not here")
@pytest.mark.parametrize(("file", "name"), RELEASED)
def test_real_clip_gives_the_released_text_embeddings(file, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        clip = load_clip("ViT-B-16-quickgelu", weights="openai")
    except UserError:
        pytest.skip("OpenAI's weights are not here")
    labels = load_label_set(name)
    released = load_text_embeddings(SHARED / "text_embeddings" / f"{file}.npy", labels, clip.embed_dim)
    assert (class_embeddings(clip, labels) * released).sum(1).min() > 0.999


def test_a_clip_with_values_that_are_not_finite_is_refused(tmp_path):
    state = dict(load_clip("glyph-clip").model.state_dict())
    state["visual.proj"] = state["visual.proj"] * float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="1 not finite, such as visual.proj"):
        load_clip("glyph-clip", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("names", [("water", "road"), ("red cat", "dining table")])
def test_names_with_unknown_words_are_refused_by_the_built_in_clip(tmp_path, names):
    with pytest.raises(UserError, match="does not know '.*'; choose another one, for instance clip=ViT-B-16-quickgelu"):
        class_embeddings(load_clip("glyph-clip"), LabelSet("own", names), cache_dir=tmp_path)


def test_names_that_the_text_encoder_cannot_tell_apart_are_refused(tmp_path):
    labels = LabelSet("own", ("red cat", "blue cat", "Red Cat"))  # the tokenizer ignores case
    for _ in range(2):
        with pytest.raises(UserError, match="cannot tell 'red cat' and 'Red Cat' apart; rename one"):
            class_embeddings(load_clip("glyph-clip"), labels, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is cached"


def test_cached_embeddings_answer_for_one_activation_only(tiny, tmp_path):
    before = cache_file(tiny, PETS, tmp_path)
    block = tiny.model.transformer.resblocks[0]
    was = block.mlp.gelu
    block.mlp.gelu = open_clip.transformer.QuickGELU()
    try:
        assert cache_file(tiny, PETS, tmp_path) != before
    finally:
        block.mlp.gelu = was
