"""The check against recorded vectors: it accepts right ones of any dimensions, and notices every wrong one."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sptseg.cli import main
from sptseg.core import IGNORE
from sptseg.models.decoder import CROSS, DecoderLayer
from sptseg.models.encoder import PromptedEncoder
from sptseg.models.prompts import DeepPrompts, SpectralPrompt
from sptseg.releases.models import read_segmenter
from sptseg.releases.names import PREFIXES
from sptseg.releases.reference import check_reference, take_stored
from sptseg.training.losses import segmentation_loss

REFERENCE = Path(__file__).resolve().parent / "reference"
VARIANTS = {  # nothing here has the dimensions of the set that the authors' code was recorded in
    "one_layer": {
        **dict(kind="sgd", blocks=2, prompted=2, width=32, heads=4, patch=4, position=6, grid=(6, 6)),
        **dict(d=32, decoder_heads=8, layers=1, image_size=24, window=(24, 24), stride=(20, 13)),
        **dict(classes=4, unseen=[3], every=3),
    },
    "one_block_five_layers": {
        **dict(kind="sgd", blocks=1, prompted=1, width=16, heads=2, patch=2, position=4, grid=(5, 5)),
        **dict(d=24, decoder_heads=4, layers=5, image_size=10, window=(10, 10), stride=(7, 7)),
        **dict(classes=7, unseen=[0, 3, 6], every=4),
    },
    "oblong": {
        **dict(kind="zegclip", blocks=5, prompted=2, width=24, heads=3, patch=4, position=3, grid=None),
        **dict(d=20, decoder_heads=4, layers=2, image_size=32, window=(24, 40), stride=(17, 31)),
        **dict(classes=3, unseen=[1], every=2),
    },
}


class Official:
    """A model like the releases', assembled here from its parts: complete layers, and the authors' names."""

    def __init__(self, *, kind, blocks, prompted, width, heads, patch, position, grid, d, decoder_heads, layers, **_):
        self.kind, self.patch = kind, patch
        visual = VisionTransformer(
            position * patch, patch, width, blocks, heads, 2.0, output_dim=d, act_layer=QuickGELU
        )
        self.encoder = PromptedEncoder(
            visual=visual,
            deep_prompts=DeepPrompts(num_blocks=prompted, num_prompts=3, width=width, patch_size=patch),
            spectral_prompt=SpectralPrompt(grid=grid, width=width, std=0.2) if grid else None,
            spectral_blocks=(1, 2)[:blocks] if grid else (),
        ).eval()
        heads = 8 if kind == "sgd" else decoder_heads  # the release builds HiLo with 8 heads, whatever it is told
        crosses = [CROSS[kind](width=d, num_heads=heads) for _ in range(layers)]
        self.layers = torch.nn.ModuleList(DecoderLayer(cross=cross, width=d) for cross in crosses).eval()
        self.q_proj = torch.nn.Linear(2 * d, d)
        for module in (self.encoder, self.layers):
            for parameter in module.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        if kind == "sgd":  # a random token may select no patch at all, and then there is nothing to compare
            maps, _ = self.encoder(torch.randn(1, 3, grid[0] * patch, grid[1] * patch))
            for cross in crosses:
                cross.selection.task_token.data += 3 * cross.hilo(maps)[0, 0].detach()

    def parameters(self):
        """By the authors' names; the first prompts and the others are one parameter here."""
        named = {f"encoder.{name}": tensor for name, tensor in self.encoder.named_parameters()}
        named |= {f"decoder.query_projection.{name}": tensor for name, tensor in self.q_proj.named_parameters()}
        back = {ours: official for official, ours in PREFIXES.items() if official != "backbone."}
        back |= {"cross.projection.": "hlfs.proj." if self.kind == "sgd" else "multihead_attn.proj."}
        back |= {"encoder.visual.": "backbone.", "encoder.deep_prompts.embeddings": "prompts"}
        for index, layer in enumerate(self.layers):
            named |= {f"{index}|{name}": tensor for name, tensor in layer.named_parameters()}
        for name, tensor in named.items():
            index, _, inside = name.rpartition("|")
            prefix = max((prefix for prefix in back if inside.startswith(prefix)), key=len)
            in_layer = f"decode_head.decoder_1.layers.{index}." if index else ""
            yield in_layer + back[prefix] + inside[len(prefix) :], tensor

    def by_name(self, value):
        """`value` of every parameter by the authors' names, None left out."""
        values = {name: value(tensor) for name, tensor in self.parameters()}
        prompts = values.pop("prompts")
        if prompts is not None:
            values |= {"backbone.prompt_embeddings": prompts[:1], "backbone.deep_prompt_embeddings": prompts[1:]}
        return {name: t.contiguous().clone() for name, t in values.items() if t is not None and len(t)}

    def state(self):
        extra = {
            f"decode_head.decoder_1.layers.{i}.self_attn.in_proj_bias": torch.ones(3) for i in range(len(self.layers))
        }
        return {**self.by_name(torch.Tensor.detach), **extra}

    def run_layers(self, maps, cls, text):
        product = text * cls[:, None]
        queries = self.q_proj(torch.cat([product, text.expand_as(product)], -1))
        every_mask, every_queries = [], []
        for layer in self.layers:
            queries, mask = layer(queries, maps)
            every_mask.append(mask.unflatten(2, maps.shape[-2:]))
            every_queries.append(queries)
        return torch.stack(every_mask), torch.stack(every_queries)

    def masks(self, images, text, size):
        return resized(self.run_layers(*self.encoder(images), text)[0][-1], (size, size))


def resized(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def texts(count, d):
    return F.normalize(torch.randn(count, d), dim=-1)


def backbone_case(model, v):
    rows, columns = v["grid"] or (7, 4)
    image = torch.randn(2, 3, rows * v["patch"], columns * v["patch"])
    patches, cls = model.encoder(image)
    config = {"input_resolution": v["position"] * v["patch"], "heads": v["heads"], "total_d_layer": v["prompted"] - 1}
    state = {k.removeprefix("backbone."): t for k, t in model.state().items() if k.startswith("backbone.")}
    return config, {"image": image}, state, {"visual_embedding": patches, "global_embedding": cls}, {}


def head_case(model, v):
    maps, cls, text = texts(70, v["d"]).mT.reshape(2, v["d"], 7, 5), texts(2, v["d"]), texts(v["classes"], v["d"])
    every_mask, every_queries = model.run_layers(maps, cls, text)
    logits, seen = resized(every_mask[-1], (v["image_size"],) * 2), seen_of(v)
    lowered = logits.sigmoid() - 0.1 * torch.isin(torch.arange(v["classes"]), torch.tensor(seen))[:, None, None]
    outputs = {"pred_masks": logits, "pred": lowered, "layer_attn": every_mask, "layer_queries": every_queries}
    outputs["pred_self_training"] = logits.sigmoid()[..., :: v["every"], :: v["every"]]
    inputs = {"visual_embedding": maps, "global_embedding": cls, "text": text}
    config = {"img_size": v["image_size"], "seen_idx": seen, "num_layers": v["layers"], "num_heads": v["decoder_heads"]}
    state = {k.removeprefix("decode_head."): t for k, t in model.state().items() if k.startswith("decode_head.")}
    note = f"eval output with self_training=True, every {v['every']}th row and column"
    return config, inputs, state, outputs, {"output.pred_self_training": note}


def seen_of(v):
    return [index for index in range(v["classes"]) if index not in v["unseen"]]


def model_config(v, self_training):
    return {
        "backbone": {"heads": v["heads"], "input_resolution": v["position"] * v["patch"]},
        "decode_head": {
            **{"img_size": v["image_size"], "seen_idx": seen_of(v), "num_heads": v["decoder_heads"]},
            "loss_decode": {"mask_weight": 20.0, "dice_weight": 3.0},
        },
        "class_names": [f"c{index}" for index in range(v["classes"])],
        **{"base_class": seen_of(v), "novel_class": v["unseen"], "both_class": list(range(v["classes"]))},
        **{"self_training": self_training, "test_cfg": {"crop_size": v["window"], "stride": v["stride"]}},
    }


def eval_case(model, v, self_training):
    (height, width), (down, right) = v["window"], v["stride"]
    image, text = torch.randn(1, 3, height + 2 * down - 3, width + right - 2), texts(v["classes"], v["d"])
    lowered = torch.zeros(v["classes"], 1, 1)
    lowered[seen_of(v)] = 0.0 if self_training else 0.1

    def scores(crop):
        return resized(model.masks(crop, text, v["image_size"]).sigmoid() - lowered, crop.shape[-2:])

    total, count = torch.zeros(1, v["classes"], *image.shape[-2:]), torch.zeros(image.shape[-2:])
    for y in (0, down, image.shape[-2] - height):
        for x in (0, image.shape[-1] - width):
            total[..., y : y + height, x : x + width] += scores(image[..., y : y + height, x : x + width])
            count[y : y + height, x : x + width] += 1
    slide, original = total / count, (31, 23)
    outputs = {"slide": slide, "slide_argmax": slide.argmax(1).to(torch.uint8)}
    outputs["slide_rescaled"] = resized(slide, original)[..., ::2, ::2]
    outputs["slide_rescaled_argmax"] = resized(slide, original).argmax(1).to(torch.uint8)
    inputs = {"image": image, "text": text, "crop": image[..., :height, :width].contiguous()}
    outputs["encode_decode"] = scores(inputs["crop"])
    return model_config(v, self_training), inputs, model.state(), outputs, {"ori_shape": original}


def train_case(model, v, self_training):
    rows, columns = v["grid"] or (8, 8)
    image = torch.randn(2, 3, rows * v["patch"], columns * v["patch"])
    label = torch.randint(0, v["classes"], (2, 1, v["image_size"], v["image_size"]))
    label[:, :, -3:] = IGNORE
    seen, unseen, text = seen_of(v), v["unseen"], texts(v["classes"], v["d"])
    table = torch.full((256,), -1)
    table[IGNORE] = IGNORE
    table[seen] = torch.tensor(seen) if self_training else torch.arange(len(seen))
    if self_training:
        table[200] = 200
    masks = model.masks(image, text if self_training else text[seen], v["image_size"])
    remapped = table[label]
    guess = torch.tensor(unseen)[masks[:, unseen].argmax(1)][:, None] if self_training else IGNORE
    target = torch.where(remapped == -1, guess, remapped)
    auxiliary = "ssim" if v["kind"] == "sgd" else "dice"
    terms = segmentation_loss(masks, target[:, 0], auxiliary=auxiliary, focal_weight=20.0, auxiliary_weight=3.0)
    terms["loss"].backward()
    kept = target[:, 0] != IGNORE
    outputs = {
        **{"decode.loss_mask": terms["focal"], f"decode.loss_{auxiliary}": terms[auxiliary], "total": terms["loss"]},
        "decode.acc_seg": 100 * (masks.argmax(1) == target[:, 0])[kept].float().mean(),
        **{"pred_masks": masks[..., :: v["every"], :: v["every"]], "label_to_loss": target.short()},
        **{"label_after_remap": remapped.short(), "visibility_seen_mask": table.short()},
        "st_mask": torch.tensor([i if i in unseen else IGNORE for i in range(256)]).short(),
        **{f"grad.{name}": tensor for name, tensor in model.by_name(trained_gradient).items()},
    }
    config = model_config(v, self_training)
    return config, {"image": image, "label": label, "text": text}, model.state(), outputs, {}


def trained_gradient(parameter):
    return parameter.grad if parameter.requires_grad else None


def loss_case(model, v):
    logits, label = torch.randn(3, 5, 9, 14, requires_grad=True), torch.randint(0, 5, (3, 21, 29))
    label[0, :9] = IGNORE
    auxiliary = "ssim" if v["kind"] == "sgd" else "dice"
    terms = segmentation_loss(
        resized(logits, (21, 29)), label, auxiliary=auxiliary, focal_weight=7.0, auxiliary_weight=2.0
    )
    named = {"loss_mask": terms["focal"], f"loss_{auxiliary}": terms[auxiliary]}
    gradients = {f"grad.{k}": torch.autograd.grad(t, logits, retain_graph=True)[0] for k, t in named.items()}
    outputs = {**named, "total": terms["loss"], **gradients}
    config = {"mask_weight": 7.0, "dice_weight": 2.0}
    return config, {"logits": logits.detach(), "label": label}, {}, outputs, {}


CASES = {
    **{"backbone": backbone_case, "head": head_case, "loss": loss_case},
    "model_eval": lambda model, v: eval_case(model, v, False),
    "model_eval_selftrained": lambda model, v: eval_case(model, v, True),
    "train_inductive": lambda model, v: train_case(model, v, False),
    "train_selftrain": lambda model, v: train_case(model, v, True),
}


def write_set(folder, variant):
    """A reference set of one variant, with one case of every kind; returns its manifest."""
    torch.manual_seed(0)
    v, cases = VARIANTS[variant], {}
    for name, make in CASES.items():
        model = Official(**v)
        config, inputs, state, outputs, notes = make(model, v)
        groups = {"input": inputs, "state": state, "output": {k: t.detach().clone() for k, t in outputs.items()}}
        stored = {f"{group}.{key}": t for group, tensors in groups.items() for key, t in tensors.items()}
        stored = {key: t.contiguous()[None] if t.ndim == 0 else t.contiguous() for key, t in stored.items()}
        cases[name] = {"file": f"{name}.safetensors", "state_from": None, "config": config}
        if name.startswith("train"):  # the weights lie elsewhere
            cases[name]["state_from"] = f"{name}_state.safetensors"
            weights = {key: t for key, t in stored.items() if key.startswith("state.")}
            save_file(weights, folder / f"{name}_state.safetensors")
            stored = {key: t for key, t in stored.items() if key not in weights}
        save_file(stored, folder / f"{name}.safetensors")
        cases[name] |= {"tensors": notes} if "ori_shape" not in notes else notes
    (folder / "manifest.json").write_text(json.dumps({"cases": cases}))
    return cases


@pytest.fixture
def own_set(tmp_path):
    write_set(tmp_path, "one_layer")
    return tmp_path


def spoil(path, change):
    """Rewrite one file of tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_authors_vectors_are_reproduced():
    lines, cases = [], json.loads((REFERENCE / "manifest.json").read_text())["cases"]
    assert check_reference(REFERENCE, report=lines.append), [line for line in lines if "FAIL" in line]
    assert lines[-1].startswith(f"{len(cases)} cases, 0 outputs")
    stored = sum(
        sum(key.startswith("output.") for key in load_file(REFERENCE / case["file"])) for case in cases.values()
    )
    assert sum("  ok" in line for line in lines) == stored


@pytest.mark.parametrize("variant", VARIANTS)
def test_sets_of_other_dimensions_pass(tmp_path, variant):
    cases, lines = write_set(tmp_path, variant), []
    assert check_reference(tmp_path, report=lines.append), [line for line in lines if "FAIL" in line]
    assert lines[-1].startswith(f"{len(cases)} cases, 0 outputs")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_single_output_is_compared(tmp_path, variant):
    def change(tensors):
        outputs = {key: t for key, t in tensors.items() if key.startswith("output.")}
        largest = max([t.abs().max() for key, t in outputs.items() if "grad." in key], default=0)
        for key, t in outputs.items():
            if t.is_floating_point():
                tensors[key] = t + 1e-3 * (largest if "grad." in key else t.abs().max())
            else:
                t.flatten()[:4] += 1

    for case in write_set(tmp_path, variant).values():
        spoil(tmp_path / case["file"], change)
    lines = []
    assert not check_reference(tmp_path, report=lines.append)
    assert not [line for line in lines if line.startswith("  ok")]


def test_one_value_off_by_a_thousandth_fails(own_set):
    def change(tensors):
        values = tensors["output.visual_embedding"].flatten()
        values[3] += 1e-3 * values.abs().max()

    spoil(own_set / "backbone.safetensors", change)
    lines = []
    assert not check_reference(own_set, report=lines.append)
    assert lines[-1].endswith("1 outputs beyond tolerance: backbone/visual_embedding")


def test_an_output_that_is_not_computed_fails(own_set):
    spoil(own_set / "loss.safetensors", lambda tensors: tensors.update({"output.loss_mystery": torch.ones(1)}))
    assert not check_reference(own_set, report=lambda line: None)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


DAMAGES = {
    "weight renamed": ("head", rename("state.q_proj.bias", "state.q_proj.offset"), "query_projection.bias"),
    "weight unknown": ("head", rename("state.q_proj.bias", "state.mystery.bias"), "mystery"),
    "encoder weight renamed": ("backbone", rename("state.ln_pre.bias", "state.ln_pre.offset"), "ln_pre"),
    "weight missing": ("backbone", lambda tensors: tensors.pop("state.proj"), "proj"),
    "weight of another shape": (
        "head",
        lambda tensors: tensors.update({"state.q_proj.weight": torch.ones(32, 32)}),
        "query_projection.weight",
    ),
    "input missing": ("head", lambda tensors: tensors.pop("input.text"), "text"),
    "no known kind": ("loss", lambda t: [t.pop(key) for key in [*t] if key.startswith("input.")], "logits"),
    "no outputs": ("loss", lambda t: [t.pop(key) for key in [*t] if key.startswith("output.")], "output"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_case_is_refused_by_name(own_set, damage, capsys):
    case, change, culprit = DAMAGES[damage]
    spoil(own_set / f"{case}.safetensors", change)
    assert main(["check-reference", str(own_set)]) == 1
    lines = capsys.readouterr().out.splitlines()
    [error] = [line for line in lines if line.startswith(f"{case}: FAIL")]
    assert f"{case}.safetensors" in error and culprit in error
    assert sum(line.endswith(" outputs") for line in lines) == len(CASES) - 1, "the other cases are run"
    assert lines[-2:] == [f"not run: {case}", f"{len(CASES)} cases, 0 outputs beyond tolerance"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"cases": {}}', '{"cases": [1]}', '{"cases": {"a": {}}}'])
def test_a_folder_without_a_manifest_is_refused(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main(["check-reference", str(tmp_path)]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert "manifest.json" in error


def test_exit_status_follows_the_comparison(own_set, capsys):
    assert main(["check-reference", str(own_set)]) == 0
    spoil(own_set / "loss.safetensors", lambda tensors: tensors["output.total"].mul_(1.001))
    assert main(["check-reference", str(own_set)]) == 1
    (own_set / "loss.safetensors").unlink()
    capsys.readouterr()
    assert main(["check-reference", str(own_set)]) == 1
    assert "loss: FAIL" in capsys.readouterr().out


def test_a_missing_gpu_is_named(own_set, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["check-reference", str(own_set), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "sptseg: device: no cuda device is available; use cpu\n"
    assert main(["check-reference", str(own_set), "--device", "cpu"]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_authors_vectors_are_reproduced_on_a_gpu():
    lines = []
    assert check_reference(REFERENCE, device="cuda", report=lines.append), [line for line in lines if "FAIL" in line]


@pytest.mark.parametrize("num_heads", [2, 4, 12])
def test_the_configured_heads_do_not_matter_to_spt_seg(tmp_path, num_heads):
    """The released layer takes `num_heads` and builds HiLo without it."""
    cases = json.loads((REFERENCE / "manifest.json").read_text())["cases"]
    head, whole = (cases[name] for name in ("spt_head", "spt_model_eval"))
    for config in (head["config"], whole["config"]["decode_head"]):
        assert config["num_heads"] == 8
        config["num_heads"] = num_heads
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": {"head": head, "whole": whole}}))
    for case in (head, whole):
        (tmp_path / case["file"]).symlink_to(REFERENCE / case["file"])
    lines = []
    assert check_reference(tmp_path, report=lines.append), [line for line in lines if "FAIL" in line]


def test_the_configured_heads_matter_to_zegclip(tmp_path):
    head = json.loads((REFERENCE / "manifest.json").read_text())["cases"]["zegclip_head"]
    head["config"]["num_heads"] //= 2
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": {"head": head}}))
    (tmp_path / head["file"]).symlink_to(REFERENCE / head["file"])
    assert not check_reference(tmp_path, report=lambda line: None)


def test_the_set_is_complete_and_small():
    cases = json.loads((REFERENCE / "manifest.json").read_text())["cases"]
    files = {path.name: path for path in REFERENCE.iterdir()}
    listed = {case["file"] for case in cases.values()}
    assert files.keys() == listed | {"manifest.json", "full_scale.json", "README.md"}
    assert sum(path.stat().st_size for path in files.values()) <= 6_000_000
    for case in cases.values():
        assert sha256(files[case["file"]].read_bytes()).hexdigest() == case["sha256"]


def test_stored_parts_are_cut_out_by_description_or_by_shape():
    maps = torch.arange(2 * 30 * 47).view(2, 30, 47)
    for step in (2, 3, 8):
        part = maps[:, ::step, ::step]
        assert torch.equal(take_stored(maps, part, f"every {step}th row and column"), part)
    assert torch.equal(take_stored(maps[0], maps[0, :4]), maps[0, :4])
    assert torch.equal(take_stored(maps[0], maps[0, :4], "the LAST 4 rows of the map"), maps[0, -4:])


def test_every_name_of_a_release_is_read_or_accounted_for():
    model = Official(**VARIANTS["one_block_five_layers"])
    again, left_out = read_segmenter(model.state(), image_size=10, heads=2, decoder_heads=4)
    last = [name for name in left_out if "layers.4." in name and "self_attn" not in name]
    assert len(left_out) == 5 + len(last) and all("last layer" in left_out[name] for name in last)
    images, text = torch.randn(1, 3, 10, 10), texts(3, 24)
    expected = model.run_layers(*model.encoder(images), text)[0][-1]
    assert torch.allclose(again(images, text), expected, atol=1e-5)
