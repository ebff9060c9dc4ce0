"""Parameters and operations: the published numbers at full size, and rules that can be checked by hand."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sptseg.data.label_sets import load_label_set
from sptseg.models.segmenter import METHODS, build_segmenter
from sptseg.paper.complexity import (
    PARTS,
    PlainCLIP,
    by_part,
    conventions,
    count_by_torch,
    count_operations,
    count_values,
    leftover_modules,
    part_of,
    release_detours,
    vit_b_16,
)
from sptseg.paper.speed import count_step, measure_training, product_rate, random_images, train_step
from sptseg.recipe import load_recipe
from sptseg.training.run import peak_memory

ROOT = Path(__file__).resolve().parents[1]
FULL_SCALE = ROOT / "tests/reference/full_scale.json"
PUBLISHED = pd.DataFrame(
    [
        ("zegclip", 10, 20, 13.82, 8.04, 110.40),
        ("zegclip", 100, 171, 14.65, 8.87, 123.94),
        ("spt-seg", 10, 20, 19.21, 10.52, 112.10),
        ("spt-seg", 100, 171, 20.04, 11.35, 125.52),
    ],
    columns=["method", "prompts", "classes", "M parameters", "M used", "G multiply-adds"],
)  # at ViT-B/16, 512×512
each_row = pytest.mark.parametrize(
    "row", list(PUBLISHED.itertuples(index=False, name=None)), ids=lambda row: f"{row[0]}-{row[1]}"
)


def multiply_adds_by_part(
    counts: pd.Series,  # of `count_by_torch`, submodules included
) -> pd.Series:  # part → multiply-adds
    """The parts of PyTorch's count."""
    own = counts.copy()
    for name in counts.index:
        above = name
        while above:
            above = above.rpartition(".")[0]
            if above in own.index:
                own[above] -= counts[name]
                break
    parts = own.groupby(own.index.map(part_of)).sum()
    return parts.reindex([part for part in dict.fromkeys(PARTS.values()) if part in parts.index])


def released(method, prompts):
    """What was recorded of the authors' code."""
    kind, case = {"zegclip": "zegclip", "spt-seg": "spt"}[method], {10: "voc_10_tokens", 100: "coco_100_tokens"}
    content = json.loads(FULL_SCALE.read_text())[kind]
    return content[case[prompts]], content["voc_10_tokens"]


def full_size(method, prompts):
    return build_segmenter(vit_b_16(), METHODS[method].model_copy(update={"num_prompts": prompts}))


def small(method="spt-seg", size=32, **settings):
    visual = VisionTransformer(32, 8, width=32, layers=3, heads=2, mlp_ratio=4, output_dim=32, act_layer=QuickGELU)
    parts = {"clip-rc": {"regions": 2}, "two-stage": {"proposals": 3}}
    parts |= dict.fromkeys(("cascade-clip", "cascade-clip+sgd"), {"tapped_blocks": "1-2"})  # fit three blocks
    settings = {"image_size": size, "num_prompts": 3, **parts.get(method, {}), **settings}
    return build_segmenter(visual, METHODS[method].model_copy(update=settings)).eval()


@each_row
def test_parameters_are_the_published_ones(row):
    method, prompts, _, published, published_used, _ = row
    with torch.device("meta"):
        model = full_size(method, prompts)
    used = count_values(model, trained=True)
    unused = sum(map(count_values, leftover_modules(model.config, 512).values()))
    assert round(used / 1e6, 2) == published_used and round((used + unused) / 1e6, 2) == published


@each_row
def test_unused_parameters_are_those_that_never_got_a_gradient(row):
    method, prompts = row[:2]
    record, voc = released(method, prompts)
    modules = leftover_modules(METHODS[method], 512)
    ours = {f"{name}.{inside}" for name, module in modules.items() for inside, _ in module.named_parameters()}
    theirs = {name for name in voc["never_used_by_the_loss"]["names"] if name.startswith("decode_head")}
    assert ours == theirs
    learnable = [record[key]["requires_grad_total"] for key in record if key.startswith("exclude_key")][-1]
    with torch.device("meta"):
        used = count_values(full_size(method, prompts), trained=True)
    assert used + sum(map(count_values, modules.values())) == learnable


@each_row
def test_products_and_attention_are_those_of_the_authors_code(row):
    """Exactly, on tensors without values: fvcore's record of the authors' code, without its detours."""
    method, prompts, classes = row[:3]
    record = released(method, prompts)[0]["fvcore"]["with_attention_counted"]["by_operator"]
    theirs = sum(record[name] for name in ("conv", "linear", "matmul", "scaled_dot_product_attention"))
    theirs += record["einsum"] - classes * 512 // 2 if method == "spt-seg" else 0
    with FakeTensorMode():
        ours = count_by_torch(full_size(method, prompts), torch.empty(1, 3, 512, 512), torch.empty(classes, 512))
    cosines = 3 * 1024 * 512 if method == "spt-seg" else 0
    outputs = 12 * prompts * (10 * 768**2 + 2 * 768 * (1025 + prompts)) + prompts * 768 * 512
    assert abs(ours[""] + outputs + cosines - theirs) <= 1  # fvcore's contraction is rounded to four digits


@pytest.mark.slow
@each_row
def test_operations_are_the_published_ones(row):
    method, prompts, classes, _, _, published = row
    with torch.device("meta"):
        model = full_size(method, prompts)
    model = model.to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.zero_()
    table = count_operations(model, torch.zeros(1, 3, 512, 512), torch.zeros(classes, 512))
    total = conventions(table)["published"] + sum(release_detours(model, classes).values())
    assert round(total / 1e9, 2) == published
    attention = table.loc["encoder.run_block", "attention"]
    assert attention == 12 * 1025 * (1025 + prompts) * 2 * 768
    record = released(method, prompts)[0]["fvcore"]
    assert abs(total - record["with_attention_counted"]["total"]) <= 1
    bare = record["with_attention_counted"]["total"] - record["plain_with_this_torch"]["total"]
    assert attention + 12 * prompts * (1025 + prompts) * 2 * 768 == bare


@pytest.mark.parametrize(
    "settings",
    [{"method": method} for method in METHODS]
    + [{"decoder_layers": 1}, {"decoder_layers": 5}, {"head_split": "paper"}, {"spectral_blocks": "2-3"}, {"size": 40}],
    ids=str,
)
def test_both_counters_agree(settings):
    model = small(**settings)
    size = model.config.image_size
    images, text = torch.randn(1, 3, size, size), torch.randn(4, *[3] * model.config.templates_apart, 32)
    table, theirs = count_operations(model, images, text), count_by_torch(model, images, text)
    products = table[["products", "attention"]].sum(axis=1)
    assert products.sum() == theirs[""] and (table >= 0).all(axis=None)
    ours = by_part(table)
    for part, count in multiply_adds_by_part(theirs).items():
        assert ours.loc[part, ["products", "attention"]].sum() == count, part


def test_counts_scale_with_the_batch_and_add_up():
    model, text = small(), torch.randn(4, 32)
    one, two = (count_operations(model, torch.randn(n, 3, 32, 32), text) for n in (1, 2))
    images = ~one.index.str.startswith("encoder.deep_prompts")  # prompts are projected once per batch
    kinds = ["products", "attention", "Fourier"]
    assert (two.loc[images, kinds] == 2 * one.loc[images, kinds]).all(axis=None)
    assert (two.loc[~images, kinds] == one.loc[~images, kinds]).all(axis=None)
    total = conventions(one)
    assert conventions(by_part(one)[list(one.columns)]).equals(total)
    assert total["fvcore"] < total["published"] < total["complete"] < 3 * total["published"]


def test_rules_by_hand():
    """Patches, blocks, the Fourier transforms and LayerNorm of a model of known sizes."""
    model = small(spectral_blocks="1-1")
    table = count_operations(model, torch.randn(1, 3, 32, 32), torch.randn(4, 32))
    patches, tokens, prompts, width, blocks = 16, 1 + 16, 3, 32, 3
    assert table.loc["encoder.visual.conv1", "products"] == patches * 3 * 8 * 8 * width
    inside = by_part(table).loc["CLIP's blocks"]
    assert inside["attention"] == blocks * 2 * tokens * (tokens + prompts) * width
    assert inside["products"] == blocks * (12 * tokens + 2 * prompts) * width * width
    assert table.loc["encoder.spectral_prompt", "Fourier"] == 2 * 2.5 * patches * 4 * width  # log2(16) = 4
    assert table.loc["encoder.visual.ln_pre", "norms and resizing"] == 5 * (1 + patches) * width
    assert table.loc["", "norms and resizing"] == 4 * 4 * 32 * 32
    plain = count_operations(PlainCLIP(model.encoder.visual), torch.randn(1, 3, 32, 32), torch.randn(4, 32))
    assert not plain["Fourier"].any() and plain["products"].sum() < table["products"].sum()


def test_counting_leaves_no_trace():
    model = small()
    count_operations(model, torch.randn(1, 3, 32, 32), torch.randn(4, 32))
    count_by_torch(model, torch.randn(1, 3, 32, 32), torch.randn(4, 32))
    assert "spectrum" not in vars(model.encoder.spectral_prompt)
    model(torch.randn(1, 3, 32, 32), torch.randn(4, 32)).sum().backward()
    assert model.encoder.spectral_prompt.filter.grad is not None


def test_an_operator_without_a_rule_is_an_error():
    class Odd(nn.Module):
        encoder = nn.Module()

        def forward(self, images, text):
            return images[:, :, :4, :4].erfinv()

    with pytest.raises(RuntimeError, match="erfinv"):
        count_operations(Odd(), torch.rand(1, 3, 32, 32), torch.randn(4, 32))


def test_random_images_are_a_dataset(tmp_path):
    first = random_images(tmp_path / "a", 3, size=(21, 34), num_classes=7, seed=1)
    again = random_images(tmp_path / "b", 3, size=(21, 34), num_classes=7, seed=1)
    assert len(first) == 3 and first[0].image.shape == (3, 21, 34) and first[0].mask.max() < 7
    assert all(torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].image, first[1].image)
    assert Image.open(tmp_path / "a/JPEGImages/000000.jpg").format == "JPEG"
    assert (tmp_path / "a/SegmentationClassAug/000002.png").is_file()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step_changes_everything_that_learns(bf16):
    torch.manual_seed(0)
    model = small("zegclip").train()  # SPT-SEG's random task tokens may select no patch of a model as small as this
    before = {name: tensor.detach().clone() for name, tensor in model.trained_tensors().items()}
    optimiser = torch.optim.AdamW(model.trained_tensors().values(), lr=1e-3)
    batch = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    loss = train_step(model, optimiser, batch, F.normalize(torch.randn(4, 32), dim=-1), auxiliary="dice", bf16=bf16)
    assert torch.tensor(loss).isfinite()
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.trained_tensors().items())


def test_training_is_measured_from_the_second_iteration_on():
    seen, batches = [], [(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "name")] * 5
    measured = measure_training(lambda images, label: seen.append(len(images)) or 1.5, batches, torch.device("cpu"))
    assert seen == [2] * 5 and measured["iterations"] == 4 and measured["last loss"] == 1.5
    assert measured["images/s"] > 0 and 0 <= measured["share of time waiting for data"] <= 1
    assert measured["images/s"] * measured["seconds per iteration"] == pytest.approx(2)


def test_a_step_counts_products_of_both_passes_and_seven_for_attention():
    linear, tokens = torch.nn.Linear(8, 6, bias=False), torch.randn(5, 8, requires_grad=True)
    product = 2 * 5 * 8 * 6
    assert count_step(lambda: linear(tokens).sum().backward()) == 3 * product  # output, gradients of input and weight
    assert count_step(lambda: linear.requires_grad_(False)(tokens).sum().backward()) == 2 * product
    parts = [torch.randn(1, 2, count, 4, requires_grad=True) for count in (7, 9, 9)]
    step = lambda: F.scaled_dot_product_attention(*parts).sum().backward()  # noqa: E731
    assert count_step(step) == 7 * (2 * 2 * 7 * 9 * 4)  # two forward, five backward


@pytest.mark.parametrize("bf16", [False, True])
def test_the_rate_of_products_is_that_of_a_computer(bf16):
    assert 1e8 < product_rate(torch.device("cpu"), bf16, repeats=1) < 1e15


def test_peak_memory_never_falls():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**24)
    after = peak_memory(torch.device("cpu"))
    del held
    assert 2**20 < before <= after <= peak_memory(torch.device("cpu"))


def test_the_recipes_are_the_published_rows():
    rows = set()
    for path in (ROOT / "nbs/experiments/complexity").glob("*-*.yaml"):
        recipe = load_recipe(path)
        rows.add((recipe.method, recipe.num_prompts, len(load_label_set(recipe.dataset).classes)))
        assert recipe.image_size == 512 and recipe.clip == "ViT-B-16-quickgelu" and recipe.clip_weights == "random"
    family = {("clip-rc", 10, 20), ("clip-rc", 100, 171), ("cascade-clip", 10, 20), ("cascade-clip", 50, 171)}
    family |= {("otseg", 10, 20), ("otseg", 100, 171)}  # counted in test_family
    assert rows == family | set(PUBLISHED[["method", "prompts", "classes"]].itertuples(index=False, name=None))


def test_the_notebook_writes_its_results(kernel, tmp_path):
    options = {"precisions": ["no", "bf16"], "repeats": 1, "image_hw": [60, 80], "iterations": 1, "num_images": 2}
    executed = kernel("complexity", tmp_path, out="results.json", recipe="demo/smoke", **options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["commit"] and results["seed"] == 0 and results["command"] and results["versions"]["torch"]
    assert set(results["training"]["by precision"]) == {"no", "bf16"} and len(results["smoke"]) == 3
    assert all(0 < one["share of the peak"] < 1 for one in results["training"]["by precision"].values())
    assert results["operations"]["published"] == sum(p["published"] for p in results["operations by part"].values())
    if not torch.cuda.is_available():
        assert results["gpu"] == "not measured" and "not measured" in executed.read_text()


@pytest.mark.slow
def test_one_training_step_at_full_size():
    """ViT-B/16's width and 32×32 patches; two of its twelve equal blocks are enough."""
    torch.manual_seed(0)
    visual = VisionTransformer(224, 16, 768, layers=2, heads=12, mlp_ratio=4, output_dim=512, act_layer=QuickGELU)
    model = build_segmenter(visual, METHODS["spt-seg"]).train()
    optimiser = torch.optim.AdamW(model.trained_tensors().values(), lr=2e-4)
    batch = torch.randn(1, 3, 512, 512), torch.randint(15, (1, 512, 512))
    loss = train_step(model, optimiser, batch, F.normalize(torch.randn(15, 512), dim=-1), auxiliary="ssim")
    gradients = {name: tensor.grad for name, tensor in model.trained_tensors().items()}
    assert torch.tensor(loss).isfinite()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
