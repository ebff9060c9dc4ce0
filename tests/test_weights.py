"""Whatever is loaded: prefixes of wrappers, other precisions, and weights that do not fit."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sptseg.core import UserError
from sptseg.models.clip import load_clip
from sptseg.models.segmenter import METHODS, build_segmenter, load_segmenter, read_segmenter_file, save_segmenter
from sptseg.models.weights import WRAPPERS, load_exactly, plain_weights, read_weights, strip_wrappers
from sptseg.releases.convert import read_released_checkpoint
from sptseg.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint

VISUAL = VisionTransformer(32, 8, width=64, layers=2, heads=2, mlp_ratio=2, output_dim=24)
FULL_SCALE = Path(__file__).resolve().parent / "reference/full_scale.json"
EMPTY = {"train": [], "val": []}


def every_name(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def every_tensor(change):
    return lambda tensors: {name: change(tensor) for name, tensor in tensors.items()}


def half_wrapped(tensors):
    """Only every other name has a prefix, as when a file is assembled from two."""
    return {("module." if index % 2 else "") + name: tensor for index, (name, tensor) in enumerate(tensors.items())}


def inside(name):
    """A part of the model was wrapped, not the whole."""
    first, _, rest = name.partition(".")
    return f"{first}._orig_mod.{rest}" if rest else name


FORMS = {  # change of the tensors; words of the warning
    "module": (every_name("module.{}".format), "'module.' stripped from"),
    "twice": (every_name("module.module.{}".format), "'module.module.' stripped from"),
    "compiled": (every_name("_orig_mod.{}".format), "'_orig_mod.' stripped from"),
    "compiled on two GPUs": (every_name("module._orig_mod.{}".format), "'module._orig_mod.' stripped from"),
    "sharded": (every_name("_fsdp_wrapped_module.{}".format), "'_fsdp_wrapped_module.' stripped from"),
    "mixed": (half_wrapped, "'module.' stripped from"),
    "a compiled part": (every_name(inside), "'_orig_mod.' stripped from"),
    "half": (every_tensor(torch.Tensor.half), "converted from float16 to float32"),
    "bfloat16": (every_tensor(torch.Tensor.bfloat16), "converted from bfloat16 to float32"),
    "double": (every_tensor(torch.Tensor.double), "converted from float64 to float32"),
}


def rounded(module):
    """The same module with weights that bfloat16 and float16 can both hold, different from the initial ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad or not isinstance(module, type(VISUAL)):
                parameter.copy_((torch.randn_like(parameter) * 16).round().clamp(-64, 64) / 64)
    return module


@pytest.fixture(scope="module")
def tiny():
    clip = load_clip("glyph-clip", weights="random")
    rounded(clip.model)
    return clip


def segmenter():
    config = METHODS["spt-seg"].model_copy(update={"image_size": 32, "decoder_layers": 2})
    return build_segmenter(VISUAL, config)


def load_as_clip(tmp_path, change, tiny):
    file = tmp_path / "w.pt"
    torch.save(change(tiny.model.state_dict()), file)
    return tiny.model.state_dict(), load_clip("glyph-clip", weights=file).model.state_dict(), file


def load_as_segmenter(tmp_path, change, tiny):
    model = rounded(segmenter())
    file = save_segmenter(tmp_path / "m.safetensors", model, clip="tiny")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)
    return model.trained_tensors(), load_segmenter(file, VISUAL, clip="tiny").trained_tensors(), file


def load_as_checkpoint(tmp_path, change, tiny):
    model, again = rounded(segmenter()), segmenter()
    optimizers = [torch.optim.AdamW(one.trained_tensors().values()) for one in (model, again)]
    save_checkpoint(tmp_path, 5, change(model.trained_tensors()), optimizers[0], EMPTY, 1)
    assert load_checkpoint(tmp_path, again, optimizers[1]) == (5, EMPTY)
    return model.trained_tensors(), again.trained_tensors(), checkpoint_path(tmp_path, 5)


def load_as_release(tmp_path, change, tiny):
    model = rounded(segmenter())
    state = {f"backbone.{name}": tensor.detach() for name, tensor in model.encoder.visual.state_dict().items()}
    file = tmp_path / "released.pth"
    torch.save({"meta": {}, "state_dict": change(state)}, file)
    found = read_released_checkpoint(file)[0]
    precise = {name: tensor.float() for name, tensor in change(state).items()}
    return dict(zip(state, precise.values(), strict=True)), found, file  # CLIP's weights are not rounded


LOADERS = [load_as_clip, load_as_segmenter, load_as_checkpoint, load_as_release]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_loader_takes_wrapped_and_differently_precise_weights_and_says_so(tmp_path, tiny, load, form):
    change, words = FORMS[form]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved, loaded, file = load(tmp_path, change, tiny)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    [said] = [str(warning.message) for warning in caught]
    assert said.startswith(f"{file}: ") and words in said and "\n" not in said


@pytest.mark.parametrize("load", LOADERS)
def test_plain_weights_are_loaded_without_a_word(tmp_path, tiny, load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, dict, tiny)


def test_the_built_in_clip_is_stored_in_half_precision_and_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load_clip("glyph-clip")
    assert all(parameter.dtype == torch.float32 for parameter in clip.model.parameters())


def first_tensor(change):
    def changed(tensors):
        name = next(iter(tensors))
        return {**tensors, name: change(tensors[name])}

    return changed


WRONG = {
    "missing": (lambda tensors: dict(list(tensors.items())[1:]), "1 missing"),
    "other names": (every_name("model.{}".format), "missing, such as .* unexpected, such as model"),
    "one too many": (lambda tensors: {**tensors, "scale": torch.ones(1)}, "1 unexpected, such as scale"),
    "another shape": (first_tensor(lambda tensor: tensor[None].clone()), "1 of another shape"),
    "not finite": (first_tensor(lambda tensor: tensor * float("nan")), "1 not finite"),
    "too large for float32": (first_tensor(lambda tensor: tensor.double() * 0 + 1e300), "1 not finite"),
    "whole numbers": (first_tensor(lambda tensor: tensor.to(torch.int8)), "1 not floating-point"),
}


@pytest.mark.filterwarnings("ignore:.*converted from float64")
@pytest.mark.parametrize("load", [load_as_clip, load_as_segmenter])
@pytest.mark.parametrize("case", WRONG)
def test_every_loader_refuses_what_does_not_fit(tmp_path, tiny, load, case):
    change, words = WRONG[case]
    with pytest.raises(UserError, match=f"the weights do not fit the model .*{words}") as error:
        load(tmp_path, change, tiny)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*converted from float64")
@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, case):
    change, words = WRONG[case]
    model, again = segmenter(), segmenter()
    optimizer = torch.optim.AdamW(model.trained_tensors().values())
    before = {name: tensor.clone() for name, tensor in again.trained_tensors().items()}
    state = {"iteration": 3, "model": change(model.trained_tensors()), "optimiser": optimizer.state_dict()}
    torch.save({**state, "history": EMPTY}, checkpoint_path(tmp_path, 3))
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path, again, torch.optim.AdamW(again.trained_tensors().values()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.trained_tensors().items())


@pytest.mark.parametrize("moment", [torch.full((3,), torch.nan), torch.zeros(2)])
def test_moments_of_the_optimizer_that_do_not_fit_are_refused(tmp_path, moment):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.bias]["exp_avg"] = moment
    save_checkpoint(tmp_path, 1, dict(model.named_parameters()), optimizer, EMPTY, 1)
    with pytest.raises(UserError, match="optimizer's exp_avg does not fit the model or is not finite"):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()))


def test_one_weight_under_two_names_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"w\.pt: holds both 'bias' and 'module\.bias'"):
        plain_weights({"bias": torch.zeros(1), "module.bias": torch.ones(1)}, "w.pt")
    save_file({"a.bias": torch.zeros(1), "a._orig_mod.bias": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="the same weight of two models"):
        read_weights(tmp_path / "w.safetensors")


def test_no_module_of_ours_has_the_name_of_a_wrapper(tiny):
    names = [*tiny.model.state_dict(), *segmenter().state_dict()]
    names += json.loads(FULL_SCALE.read_text())["spt"]["voc_10_tokens"]["parameters"]
    assert len(names) > 200 and all(strip_wrappers(name) == name for name in names)
    assert not set(WRAPPERS) & {part for name in names for part in name.split(".")}


def test_loading_keeps_the_tensors_of_the_module_and_its_gradients_flags():
    layer = nn.Linear(2, 2).requires_grad_(False)
    places = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    load_exactly(layer.state_dict(), {"weight": torch.eye(2), "bias": torch.ones(2)}, "here")
    assert {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()} == places
    assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0)) and not layer.weight.requires_grad


def test_class_embeddings_in_a_file_are_checked_and_brought_to_float32(tmp_path):
    file = save_segmenter(tmp_path / "m.safetensors", segmenter(), clip="tiny", embeddings=torch.eye(3))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({f"module.{name}": tensor.half() for name, tensor in load_file(file).items()}, file, metadata)
    with pytest.warns(UserWarning, match="'module.' stripped .*converted from float16"):
        assert torch.equal(read_segmenter_file(file).embeddings, torch.eye(3))
    save_segmenter(file, segmenter(), clip="tiny", embeddings=torch.eye(3) * float("nan"))
    with pytest.raises(UserError, match="its class embeddings are not finite"):
        load_segmenter(file, VISUAL, clip="tiny")
