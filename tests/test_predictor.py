"""Labels of any image by any names: equal to the evaluation's, the same through every way in, refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import save_file

import sptseg
from sptseg.core import UserError, asset_path
from sptseg.data.benchmarks import load_benchmark
from sptseg.data.label_sets import load_label_set
from sptseg.evaluation.evaluate import eval_loader, evaluate_weights, load_model
from sptseg.evaluation.metrics import SegmentationMetrics
from sptseg.inference.model_files import shipped_models
from sptseg.inference.results import none_label
from sptseg.models.segmenter import read_segmenter_file
from sptseg.recipe import load_recipe

NAMES = ["red heart", "green cat", "yellow knight"]
EXAMPLES = sorted(asset_path("examples").glob("*.png"))
RECORDS = asset_path("results/table1/glyphs-20")


@pytest.fixture(scope="module")
def model():
    return sptseg.load("spt-seg-glyphs", device="cpu")


@pytest.mark.parametrize("method", ["spt-seg", "zegclip"])
def test_shipped_models_label_test_images_as_the_evaluation_does(method, one_thread):
    recipe = load_recipe(f"table1/glyphs-20/{method}", val_images=12)
    benchmark, _, predict = load_model(recipe, shipped_models()[f"{method}-glyphs"])
    model = sptseg.load(f"{method}-glyphs", device="cpu")
    assert model.classes == benchmark.labels.classes and len(model.unseen) == 5
    images = [benchmark.val[index].image for index in range(12)]
    together = model.predict(images)
    for result, sample, (image, mask, _) in zip(
        together, images, eval_loader(benchmark, recipe.image_size), strict=True
    ):
        expected = predict(image, tuple(mask.shape[-2:])).cpu().numpy()
        alone = model.predict(sample)
        assert (alone.labels == expected).all() and alone.labels.dtype == np.uint8
        assert (result.labels != expected).mean() < 0.001, "in a batch, sums may be rounded differently"


@pytest.mark.parametrize("method", ["spt-seg", "zegclip"])
def test_shipped_models_carry_the_record_of_table_1(method):
    record = json.loads((RECORDS / method / "seed0.json").read_text())
    model = sptseg.load(f"{method}-glyphs", device="cpu")
    assert model.metrics == record["metrics"] and model.notes.provenance["versions"] == record["versions"]
    assert model.notes.missing() == [] and model.notes.setting == "inductive"


def test_examples_are_test_images():
    scenes = load_benchmark("glyphs-20", size=96, seed=0).val
    drawn = {scenes[index].image.permute(1, 2, 0).numpy().tobytes() for index in range(12)}
    assert len(EXAMPLES) == 4 and all(np.asarray(Image.open(path)).tobytes() in drawn for path in EXAMPLES)


def test_features_kept_by_encode_give_the_same_labels(model):
    kept = model.encode(EXAMPLES[0])
    for names in (NAMES, None, ["purple star", "green heart"]):
        assert (model.predict(kept, names).labels == model.predict(EXAMPLES[0], names).labels).all()


def test_scores_are_those_behind_the_labels(model):
    result = model.predict(EXAMPLES[1], scores=True)
    assert result.scores.shape == (20, 96, 96) and (result.scores.argmax(0) == result.labels).all()
    assert (result.score("red heart") == result.scores[result.classes.index("red heart")]).all()
    with pytest.raises(UserError, match="scores=True"):
        _ = model.predict(EXAMPLES[1]).scores


def test_threshold_leaves_pixels_without_a_class(model):
    whole, part = model.predict(EXAMPLES[1], scores=True), model.predict(EXAMPLES[1], threshold=0.2)
    low = whole.scores.max(0) < np.float32(0.2)
    assert 0 < low.sum() < low.size and (part.labels[low] == 255).all() and (part.labels == whole.labels)[~low].all()
    assert part.none == 255 and none_label(256) == 65535


def test_the_bias_lowers_names_seen_in_training_and_only_beside_others(model):
    seen = "green heart"
    assert seen not in model.unseen and "green cat" in model.unseen
    mixed = {bias: model.predict(EXAMPLES[1], [seen, "green cat"], seen_bias=bias, scores=True) for bias in (0, 0.3)}
    assert np.allclose(mixed[0].score(seen) - mixed[0.3].score(seen), 0.3, atol=1e-6)
    assert (mixed[0].score("green cat") == mixed[0.3].score("green cat")).all()
    alone = [model.predict(EXAMPLES[1], [seen, "yellow star"], seen_bias=bias, scores=True) for bias in (0, 0.3)]
    assert (alone[0].scores == alone[1].scores).all()


REFUSED = {
    "no classes": (lambda model: model.predict(EXAMPLES[0], []), "no names"),
    "a name twice": (lambda model: model.predict(EXAMPLES[0], ["red cat", "red  cat"]), "'red cat' is named twice"),
    "a text": (lambda model: model.predict(EXAMPLES[0], "red cat"), r"\['red cat'\]"),
    "an unknown word": (lambda model: model.predict(EXAMPLES[0], ["zeppelin"]), "does not know"),
    "equal to CLIP": (lambda model: model.predict(EXAMPLES[0], ["red cat", "Red cat"]), "apart"),
    "a wrong threshold": (lambda model: model.predict(EXAMPLES[0], threshold=2), "threshold: 2"),
    "a wrong bias": (lambda model: model.predict(EXAMPLES[0], seen_bias="x"), "seen_bias: 'x'"),
    "a template without a place": (lambda model: model.predict(EXAMPLES[0], templates=["a photo"]), "'a photo'"),
    "no file": (lambda model: model.predict("nowhere.png"), "nowhere.png: cannot be read"),
    "an unknown model": (lambda model: sptseg.load("spt-seg-glyph"), "did you mean 'spt-seg-glyphs'"),
    "a normalised tensor": (lambda model: model.predict(torch.randn(3, 8, 8)), "0..1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(model, case):
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_list_of_kept_and_new_images_keeps_its_order(model):
    mixed = model.predict([EXAMPLES[0], model.encode(EXAMPLES[1]), EXAMPLES[2]], NAMES)
    assert [result.stem for result in mixed] == [path.stem for path in EXAMPLES[:3]]
    assert model.predict([], NAMES) == []


def test_a_folder_of_save_pretrained_gives_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    shipped = shipped_models()["spt-seg-glyphs"]
    for again in (
        sptseg.load(tmp_path / "saved"),
        sptseg.Predictor.from_pretrained(tmp_path / "saved"),
        sptseg.Predictor.from_pretrained(str(tmp_path / "saved"), device="cpu"),
    ):
        assert (again.predict(EXAMPLES[0]).labels == model.predict(EXAMPLES[0]).labels).all()
        assert again.notes == model.notes and again.source["sha256"]
    before, after = read_segmenter_file(shipped), read_segmenter_file(tmp_path / "saved/model.safetensors")
    assert before.notes == after.notes and before.config == after.config
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    card = ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "sptseg"
    values = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert values["hIoU"] == model.metrics["hIoU"] and model.notes.clip_sha256 in card.text
    assert all(name in card.text for name in model.classes) and "bibtex" in card.text and "sptseg.load" in card.text


def test_push_to_hub_uploads_that_folder(model, monkeypatch):
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def upload_folder(self, *, repo_id, folder_path, **_):
        sent.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()}, to=repo_id)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model.push_to_hub("someone/spt-seg-glyphs")
    assert sent["to"] == "someone/spt-seg-glyphs" and {"model.safetensors", "config.json", "README.md"} < sent.keys()


def old_file(path, **changes):
    """A file as earlier versions wrote it, without a description."""
    file = read_segmenter_file(shipped_models()["spt-seg-glyphs"])
    notes = {key: file.notes[key] for key in ("method", "dataset", "setting", "clip")}
    text = json.dumps({**notes, **changes, "config": file.config.model_dump()})
    save_file(file.tensors, path, {"sptseg": text})
    return path


def test_old_files_load_with_a_note_of_what_is_missing(model, tmp_path):
    with pytest.warns(UserWarning, match="an older file that does not say classes, templates, seen_bias"):
        again = sptseg.load(old_file(tmp_path / "old.safetensors"))
    assert again.classes == model.classes and again.unseen == model.unseen and again.notes.stride == model.notes.stride
    assert (again.predict(EXAMPLES[0]).labels == model.predict(EXAMPLES[0]).labels).all()
    with pytest.warns(UserWarning, match="no known label set"):
        own = sptseg.load(old_file(tmp_path / "own.safetensors", dataset="folder"))
    with pytest.raises(UserError, match="no names"):
        own.predict(EXAMPLES[0])
    assert own.predict(EXAMPLES[0], NAMES).classes == tuple(NAMES)


def test_another_clip_than_that_of_the_training_is_refused(tmp_path):
    file = read_segmenter_file(shipped_models()["spt-seg-glyphs"])
    notes = {**file.notes, "clip_sha256": "0" * 64, "config": file.config.model_dump()}
    save_file(file.tensors, tmp_path / "m.safetensors", {"sptseg": json.dumps(notes)})
    with pytest.raises(UserError, match="other weights of clip 'glyph-clip' .SHA-256 0000"):
        sptseg.load(tmp_path / "m.safetensors")
    notes |= {"clip_weights": "/nowhere/clip.pt"}
    save_file(file.tensors, tmp_path / "m.safetensors", {"sptseg": json.dumps(notes)})
    with pytest.raises(UserError, match="needs its CLIP.*clip_weights=FILE"):
        sptseg.load(tmp_path / "m.safetensors")


def test_files_of_other_projects_are_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not written by sptseg"):
        sptseg.load(tmp_path / "other.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "released.pth")
    with pytest.raises(UserError, match="sptseg convert"):
        sptseg.load(tmp_path / "released.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no model.safetensors"):
        sptseg.load(tmp_path / "empty")


MEMORY = """
import resource, sys
import torch
from torch.nn import functional as F
from sptseg.data.label_sets import LabelSet
from sptseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise
from sptseg.evaluation.evaluate import segmenter_predictor
from sptseg.evaluation.metrics import SegmentationMetrics
from sptseg.inference.predictor import Predictor
from sptseg.models.clip import load_clip
from sptseg.models.segmenter import METHODS, FileNotes, build_segmenter
clip_name, side, height, width, count, scaled = sys.argv[1], *map(int, sys.argv[2:])
clip = load_clip(clip_name, weights=None if clip_name == "glyph-clip" else "random")
names = tuple(f"thing {number}" for number in range(count))
notes = FileNotes(clip="x", setting="inductive", classes=names, unseen=names[:5], templates=("a {}",), seen_bias=0.1,
                  stride=side * 5 // 6, mean=IMAGENET_MEAN, std=IMAGENET_STD)
torch.manual_seed(0)
model = build_segmenter(clip.visual, METHODS["spt-seg"].model_copy(update={"image_size": side})).eval()
text = F.normalize(torch.randn(count, clip.embed_dim), dim=-1)
predictor = Predictor(model, clip, notes, text, device="cpu")
image = torch.randint(256, (3, height, width), dtype=torch.uint8)
predictor.predict(image[:, :side, :side])  # libraries have allocated their buffers
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if scaled:
    assert predictor.predict(image, threshold=0.1).labels.shape == (height, width)
else:
    labels = segmenter_predictor(model, text, tuple(range(5, count)))(normalise(image)[None], (height, width))
    metrics = SegmentationMetrics(LabelSet("things", names, unseen=(0,)))
    metrics.update(labels, torch.zeros_like(labels))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 2**10)
"""


def added_memory(*arguments):
    """Peak memory in MiB above that of the loaded model."""
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_memory_of_a_large_image_is_bounded():
    """Scores of 20 classes for 4.8 million pixels take 366 MiB; image, labels and best scores about 100."""
    assert added_memory("glyph-clip", 96, 1600, 3000, 20, 1) < 330


@pytest.mark.slow
def test_a_photograph_of_twelve_million_pixels_takes_less_than_one_gib():
    assert added_memory("ViT-B-16-quickgelu", 512, 3000, 4000, 171, 1) < 1024


def test_seen_bias_of_a_recipe_is_that_of_its_evaluation():
    """The metrics for another bias are those of labels predicted with it, and a smaller bias favours seen classes."""
    weights, found = shipped_models()["spt-seg-glyphs"], {}
    model = sptseg.load("spt-seg-glyphs", device="cpu")
    for bias in (0.0, 0.4):
        recipe = load_recipe("table1/glyphs-20/spt-seg", val_images=12, seen_bias=bias)
        found[bias] = evaluate_weights(recipe, weights, progress=False)["metrics"]
        metrics, scenes = SegmentationMetrics(load_label_set("glyphs-20")), load_benchmark("glyphs-20", size=96).val
        for index in range(12):
            labels = model.predict(scenes[index].image, seen_bias=bias).labels
            metrics.update(torch.from_numpy(labels).long(), scenes[index].mask)
        assert metrics.compute().as_dict() == found[bias]
    assert found[0.0]["mIoU(S)"] > found[0.4]["mIoU(S)"]
