"""Training runs: killed and resumed, blind to unseen labels, and stopped with their last checkpoint kept."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import yaml
from torch.utils.data import Dataset

import sptseg.training.loop
from sptseg.cli import main
from sptseg.core import IGNORE, UserError
from sptseg.data.benchmarks import Benchmark
from sptseg.data.label_sets import SETTINGS
from sptseg.evaluation.evaluate import evaluate_weights, load_parts, recipe_of_run, training_free_predictor
from sptseg.models.clip import load_clip
from sptseg.models.segmenter import METHODS
from sptseg.recipe import UNUSED_KEYS, Recipe, check_recipe, learning_rate, load_recipe, phases, slow_run_warning
from sptseg.training.batches import BatchSampler
from sptseg.training.checkpoint import checkpoints
from sptseg.training.evaluations import best_evaluation, note_on_seen_classes
from sptseg.training.loop import train
from sptseg.training.run import initial_segmenter
from sptseg.training.run_folder import BEST, RESULTS, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    **{"dataset": "glyphs-20", "image_size": 32, "num_prompts": 2, "decoder_layers": 2, "train_images": 6},
    **{"val_images": 1, "iterations": 2, "batch_size": 2, "warmup_iterations": 0, "lr": 1e-3, "checkpoint_every": 1},
    "keep_final_checkpoints": True,
}


PARTS = {"clip-rc": {"regions": 2}, "cascade-clip": {"tapped_blocks": "2-3"}}  # fit the tiny CLIP
OTHERS = {"cascade-clip+sgd": {"tapped_blocks": "2-3"}, "two-stage": {"proposals": 4}}


def tiny(**changes):
    left_out = UNUSED_KEYS.get(changes.get("method"), ())
    return check_recipe({**{key: value for key, value in TINY.items() if key not in left_out}, **changes})


def weights_of(out, **changes):
    train(tiny(**changes), out, progress=False)
    return (out / WEIGHTS).read_bytes()


def newest(out):
    """Content of the newest checkpoint."""
    return torch.load(checkpoints(out)[0], weights_only=True)


def snapshot(folder):
    """Content and time of change of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = ["iterations=24", "checkpoint_every=6", "eval_every=12", "batch_size=2", "val_images=2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["train", "demo/smoke", "--quiet", *settings, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sptseg.cli", *command, str(killed)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not checkpoints(killed) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed in the middle, it did not end by itself"
    assert not (killed / WEIGHTS).exists() and not (killed / RESULTS).exists()
    assert 0 < newest(killed)["iteration"] < 24
    for out in (killed, whole):
        assert main([*command, str(out)]) == 0
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    histories = [json.loads((out / RESULTS).read_text())["history"] for out in (killed, whole)]
    assert histories[0] == histories[1] and [row["iteration"] for row in histories[0]["train"]] == [*range(1, 25)]


STOPS = [("inductive", 1), ("supervised", 3), ("transductive", 1), ("transductive", 2), ("transductive", 3)]


@pytest.mark.parametrize(("setting", "stop"), STOPS)
def test_resuming_at_any_iteration_changes_nothing(tmp_path, interrupted_after, setting, stop):
    whole = weights_of(tmp_path / "whole", iterations=4, setting=setting)
    with interrupted_after(stop):
        weights_of(tmp_path / "stopped", iterations=4, setting=setting)
    assert weights_of(tmp_path / "stopped", iterations=4, setting=setting) == whole


@pytest.mark.parametrize("method", [*PARTS, "projection", "two-stage"])
def test_resuming_keeps_what_is_not_trained(tmp_path, method):
    setting = "inductive" if method == "two-stage" else "transductive"
    settings = {"method": method, "iterations": 4, "setting": setting, **(PARTS | OTHERS).get(method, {})}
    whole = weights_of(tmp_path, **settings)
    for path in [checkpoints(tmp_path)[0], *(tmp_path / name for name in (RESULTS, WEIGHTS))]:
        path.unlink()
    torch.manual_seed(5)
    assert weights_of(tmp_path, **settings) == whole


def test_the_filter_may_learn_at_a_rate_of_its_own(tmp_path, interrupted_after):
    """In its first step AdamW moves every value by the learning rate; a resumed run keeps both rates."""
    name, moved = "encoder.spectral_prompt.filter", {}
    torch.manual_seed(0)
    start = initial_segmenter(tiny(), load_clip("glyph-clip")).trained_tensors()[name].detach()
    for scale in (None, 1, 10):
        with interrupted_after(1):
            train(tiny(filter_lr_scale=scale, iterations=3), tmp_path / str(scale), progress=False)
        moved[scale] = (newest(tmp_path / str(scale))["model"][name] - start).abs().median().item()
    assert moved[None] == moved[1] == pytest.approx(1e-3, rel=0.01) and moved[10] == pytest.approx(1e-2, rel=0.01)
    settings = {"filter_lr_scale": 10, "iterations": 3}
    assert weights_of(tmp_path / "10", **settings) == weights_of(tmp_path / "whole", **settings)


class ChangedMasks(Dataset):
    """A dataset whose masks go through a function."""

    def __init__(self, base, change):
        self.base, self.change = base, change

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        sample = self.base[index]
        return sample._replace(mask=self.change(sample.mask.clone()))


def weights_with_masks(out, monkeypatch, change, **changes):
    """Train with changed masks."""

    def changed_parts(recipe):
        benchmark, *rest = load_parts(recipe)
        hidden = torch.tensor(benchmark.labels.unseen)
        images = ChangedMasks(benchmark.train, lambda mask: change(mask, hidden))
        assert any(torch.isin(sample.mask, hidden).any() for sample in map(benchmark.train.__getitem__, range(6)))
        return Benchmark(benchmark.labels, images, benchmark.val), *rest

    with monkeypatch.context() as patch:
        patch.setattr("sptseg.training.run.load_parts", changed_parts)
        return weights_of(out, iterations=6, **changes)


def shuffle_unseen(mask, unseen):
    """Every pixel of an unseen class gets a random unseen class."""
    guess = unseen[torch.randint(len(unseen), mask.shape)].to(mask.dtype)
    return torch.where(torch.isin(mask, unseen), guess, mask)


def drop_unseen(mask, unseen):
    return torch.where(torch.isin(mask, unseen), IGNORE, mask)


@pytest.mark.parametrize(
    ("method", "setting"),
    [*(("spt-seg", setting) for setting in SETTINGS), ("projection", "inductive"), ("two-stage", "inductive")],
)
def test_unseen_labels_reach_supervised_training_only(tmp_path, monkeypatch, method, setting):
    settings = {"method": method, "setting": setting, **OTHERS.get(method, {})}
    plain = weights_of(tmp_path / "plain", iterations=6, **settings)
    shuffled = weights_with_masks(tmp_path / "shuffled", monkeypatch, shuffle_unseen, **settings)
    dropped = weights_with_masks(tmp_path / "dropped", monkeypatch, drop_unseen, **settings)
    assert (shuffled == plain) == (setting != "supervised")
    assert (dropped == plain) == (setting == "inductive"), "where they are is known in transductive training"


def test_the_number_of_workers_does_not_matter(tmp_path):
    alone, helped = (tmp_path / f"{workers} workers" for workers in (0, 2))
    assert weights_of(alone, workers=0) == weights_of(helped, workers=2)


def test_deterministic_runs_use_deterministic_operations_only(tmp_path, monkeypatch):
    used, stepping = [], sptseg.training.loop.step

    def watch(*arguments):
        used.append(torch.are_deterministic_algorithms_enabled())
        return stepping(*arguments)

    monkeypatch.setattr("sptseg.training.loop.step", watch)
    runs = [weights_of(tmp_path / name, deterministic=name != "plain") for name in ("plain", "one", "two")]
    assert runs[0] == runs[1] == runs[2], "on one CPU thread, the plain run is deterministic, too"
    assert used == [False, False, True, True, True, True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("stopped", [False, True])
def test_losses_that_are_read_later_are_the_same(tmp_path, monkeypatch, stopped):
    settings = {"iterations": 7, "eval_every": 7, "checkpoint_every": 4}
    whole = train(tiny(**settings), tmp_path / "whole", progress=False)
    monkeypatch.setitem(sptseg.training.run.READ_EVERY, "cpu", 3)
    stepping, steps = sptseg.training.loop.step, []

    def interrupt(*arguments):
        steps.append(arguments)
        if stopped and len(steps) == 6:
            raise KeyboardInterrupt
        stepping(*arguments)

    monkeypatch.setattr("sptseg.training.loop.step", interrupt)
    if stopped:
        with pytest.raises(KeyboardInterrupt, match="iteration 5 of 7"):
            train(tiny(**settings), tmp_path / "late", progress=False)
    late = train(tiny(**settings), tmp_path / "late", progress=False)
    assert late["history"] == whole["history"]
    assert (tmp_path / "late" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_loss_that_is_read_later_and_not_finite_is_never_saved(tmp_path, monkeypatch):
    computing, losses = sptseg.training.run.training_loss, []

    def broken(*arguments, **options):
        losses.append(computing(*arguments, **options))
        return {name: loss * math.nan for name, loss in losses[-1].items()} if len(losses) > 2 else losses[-1]

    monkeypatch.setitem(sptseg.training.run.READ_EVERY, "cpu", 20)
    monkeypatch.setattr("sptseg.training.run.training_loss", broken)
    with pytest.raises(UserError, match="iteration 2: the loss is nan.*the last checkpoint is kept"):
        train(tiny(iterations=6, eval_every=6, checkpoint_every=2), tmp_path, progress=False)
    [kept] = checkpoints(tmp_path)
    assert torch.load(kept, weights_only=True)["iteration"] == 2


def test_bfloat16_is_for_training_and_evaluations_are_in_float32(tmp_path):
    changes = {"method": "zegclip", "val_images": 20, "iterations": 6}
    weights = {kind: weights_of(tmp_path / kind, mixed_precision=kind, **changes) for kind in ("no", "bf16")}
    assert weights["no"] != weights["bf16"]
    results = json.loads((tmp_path / "bf16" / RESULTS).read_text())
    recipe, file = recipe_of_run(tmp_path / "bf16"), tmp_path / "bf16" / WEIGHTS
    evaluated = evaluate_weights(recipe, file, progress=False)
    assert evaluated["metrics"] == results["metrics"] and evaluated["mixed_precision"] == "no"


def test_an_evaluation_in_bfloat16_says_so(tmp_path, capsys):
    train(tiny(method="zegclip", val_images=4, iterations=2), tmp_path, progress=False)
    for settings in ([], ["mixed_precision=bf16"], ["mixed_precision=no"]):
        assert main(["evaluate", str(tmp_path), *settings, "--quiet"]) == 0
        [record] = tmp_path.glob("evaluation-*.json")
        expected = "bf16" if settings == ["mixed_precision=bf16"] else "no"
        assert json.loads(record.read_text())["mixed_precision"] == expected


def test_tensorboard_gets_losses_metrics_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = train(tiny(eval_every=1, val_images=2), tmp_path, progress=False)
    (events,) = (tmp_path / "tensorboard").glob("events.out*")
    log = EventAccumulator(str(events)).Reload()
    names = ["train/loss", "train/learning rate", "speed/images per second", "speed/memory in GB", "val/mIoU(U)"]
    assert all([event.step for event in log.Scalars(name)] == [1, 2] for name in names)
    assert [event.value for event in log.Scalars("train/learning rate")] == pytest.approx(
        [learning_rate(tiny(), step) for step in range(2)]
    )
    per_class = {name for name in log.Tags()["scalars"] if name.startswith("val IoU/")}
    assert {f"val IoU/{name}" for name, value in results["metrics"]["IoU"].items() if value is not None} <= per_class
    images = log.Images("images")
    assert [image.step for image in images] == [1, 2] and images[0].width > images[0].height > 100
    (settings,) = tmp_path.rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text())["image_size"] == 32


def test_other_trackers(tmp_path, monkeypatch):
    train(tiny(tracker="none"), tmp_path / "none", progress=False)
    assert not (tmp_path / "none/tensorboard").exists()
    monkeypatch.setattr("sptseg.training.loop.get_available_trackers", list)
    with pytest.raises(UserError, match="tracker: wandb is not installed"):
        train(tiny(tracker="wandb"), tmp_path / "wandb", progress=False)


def test_a_finished_run_keeps_no_checkpoints_unless_told(tmp_path):
    results = train(tiny(keep_final_checkpoints=False), tmp_path, progress=False)
    assert not checkpoints(tmp_path) and (tmp_path / WEIGHTS).exists()
    again = train(tiny(tracker="none", keep_final_checkpoints=True), tmp_path, progress=False)
    assert again == json.loads(json.dumps(results)), "a finished run gives its results"


def test_the_seed_does_matter(tmp_path):
    assert weights_of(tmp_path / "0", seed=0) != weights_of(tmp_path / "1", seed=1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe, kept = tiny(lr=1e30, iterations=5), []
    for _ in range(2):
        with pytest.raises(UserError, match=r"^iteration \d: the loss is (nan|inf); lower lr \(1e\+30\)") as error:
            train(recipe, tmp_path, progress=False)
        kept.append(checkpoints(tmp_path)[0].read_bytes())
        done = newest(tmp_path)["iteration"]
        assert str(error.value).startswith(f"iteration {done}:") and done >= 1
    assert kept[0] == kept[1]
    assert not (tmp_path / WEIGHTS).exists() and not (tmp_path / RESULTS).exists()


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        train(tiny(lr=1e30, iterations=5, checkpoint_every=9), tmp_path, progress=False)


def test_a_changed_recipe_is_refused_and_nothing_touched(tmp_path):
    train(tiny(), tmp_path, progress=False)
    for missing in ([], [RESULTS], [RESULTS, WEIGHTS]):
        for name in missing:
            (tmp_path / name).unlink(missing_ok=True)
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=r"seed 0 → 3, lr 0.001 → 0.1|lr 0.001 → 0.1, seed 0 → 3") as error:
            train(tiny(seed=3, lr=0.1), tmp_path, progress=False)
        assert str(error.value).startswith(f"{tmp_path}: ") and snapshot(tmp_path) == before


def test_a_folder_in_which_nothing_was_trained_takes_another_recipe(tmp_path):
    with pytest.raises(UserError, match="spectral_blocks"):
        train(tiny(spectral_blocks="2-1"), tmp_path, progress=False)
    train(tiny(), tmp_path, progress=False)
    assert "spectral_blocks" not in yaml.safe_load((tmp_path / "recipe.yaml").read_text())


def test_a_finished_run_gives_its_results_without_training(tmp_path, monkeypatch):
    results = train(tiny(), tmp_path, progress=False)
    before = snapshot(tmp_path)
    monkeypatch.setattr("sptseg.training.loop.Run", None)
    assert train(tiny(), tmp_path, progress=False) == json.loads(json.dumps(results)) and snapshot(tmp_path) == before


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_content(path):
    torch.save({"iteration": 1}, path)


DAMAGES = {"cut": cut, "empty": lambda path: path.write_bytes(b""), "other": other_content}
DAMAGES["list"] = lambda path: torch.save([1, 2], path)
DAMAGES["text"] = lambda path: path.write_text("not a checkpoint")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, damage):
    weights_of(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / RESULTS).unlink()
    last, first = checkpoints(tmp_path)
    DAMAGES[damage](last)
    with pytest.warns(UserWarning, match=f"damaged checkpoint .*; continuing from {first.name}") as caught:
        assert weights_of(tmp_path) == weights, "the run goes on from the checkpoint before"
    assert str(caught[0].message).startswith(f"{last}: ") and "\n" not in str(caught[0].message)
    (tmp_path / RESULTS).unlink()
    for path in checkpoints(tmp_path):
        DAMAGES[damage](path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="damaged checkpoint") as error:
        train(tiny(), tmp_path, progress=False)
    assert str(error.value).startswith(f"{last}: ") and "\n" not in str(error.value)
    assert before.items() <= snapshot(tmp_path).items()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(tmp_path, keep):
    train(tiny(iterations=5, keep_checkpoints=keep), tmp_path, progress=False)
    numbers = [torch.load(path, weights_only=True)["iteration"] for path in checkpoints(tmp_path)]
    assert numbers == [5, 4, 3, 2, 1][:keep]


def test_the_best_evaluation_is_kept_and_the_last_one_reported(tmp_path):
    results = train(tiny(iterations=4, eval_every=1, best_by="pAcc", lr=1e-2), tmp_path, progress=False)
    rows = results["history"]["val"]
    assert results["reported"] == "last" and results["metrics"]["pAcc"] == rows[-1]["pAcc"]
    best = max(rows, key=lambda row: row["pAcc"])
    assert results["best"]["by"] == "pAcc" and results["best"]["iteration"] == best["iteration"]
    expected = tmp_path / "until"
    train(tiny(iterations=4, eval_every=1, best_by="pAcc", lr=1e-2), expected, progress=False)
    assert (expected / BEST).read_bytes() == (tmp_path / BEST).read_bytes()
    assert ((tmp_path / BEST).read_bytes() == (tmp_path / WEIGHTS).read_bytes()) == (best is rows[-1])


def test_best_evaluations_and_notes():
    def row(iteration, seen, unseen, miou=0.0):
        return {"iteration": iteration, "mIoU(S)": seen, "mIoU(U)": unseen, "mIoU": miou, "hIoU": unseen}

    rows = [row(1, 10.0, 20.0), row(2, 30.0, 25.0), row(3, 40.0, 25.0), row(4, 50.0, 23.0)]
    assert best_evaluation(rows, "hIoU") is rows[1], "the first of equals"
    assert best_evaluation([row(1, 10.0, None, 5.0), row(2, 10.0, None, 9.0)], "hIoU")["iteration"] == 2
    assert note_on_seen_classes(rows[:3]) is None
    assert note_on_seen_classes(rows) == (
        "since iteration 2, seen classes gain (mIoU(S) 30.0 → 50.0) and unseen ones lose (mIoU(U) 25.0 → 23.0)"
    )
    assert note_on_seen_classes([*rows[:2], row(3, 29.0, 5.0)]) is None, "both lose: that is no over-fitting"
    assert note_on_seen_classes([row(1, 10.0, None)]) is None


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_visit_every_image_once_per_epoch(processes):
    recipe = tiny(batch_size=8, iterations=12, seed=5)
    samplers = [BatchSampler(length=10, recipe=recipe, rank=rank, processes=processes) for rank in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    assert all(len(sampler) == len(share) == 12 for sampler, share in zip(samplers, shares, strict=True))
    keys = [key for together in zip(*shares, strict=True) for batch in together for key in batch]
    assert keys == [key for batch in BatchSampler(length=10, recipe=recipe) for key in batch]
    visits = Counter(keys)
    assert set(visits.values()) == {1} and len(visits) == 96
    assert {key for key in keys if key[0] < 9} == {(epoch, index) for epoch in range(9) for index in range(10)}
    assert [index for epoch, index in keys if epoch == 0] != [index for epoch, index in keys if epoch == 1]


def test_batches_continue_where_they_stopped():
    recipe = tiny(batch_size=8, iterations=12)
    whole = list(BatchSampler(length=10, recipe=recipe))
    assert list(BatchSampler(length=10, recipe=recipe, first=5)) == whole[5:]
    assert list(BatchSampler(length=10, recipe=recipe, first=5, last=7)) == whole[5:7]
    assert whole != list(BatchSampler(length=10, recipe=tiny(batch_size=8, iterations=12, seed=1)))
    with pytest.raises(UserError, match="batch_size: 8 cannot be shared by 3"):
        BatchSampler(length=10, recipe=recipe, processes=3)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 2e-10),  # 2e-4 · 1e-6
        (750, (1.99e-4 * 0.9625**0.9 + 1e-6) * (1 - 0.5 * (1 - 1e-6))),
        (1499, (1.99e-4 * (1 - 1499 / 20_000) ** 0.9 + 1e-6) * (1 - (1 - 1e-6) / 1500)),
        (1500, 1.99e-4 * 0.925**0.9 + 1e-6),
        (10_000, 1.99e-4 * 0.5**0.9 + 1e-6),
        (19_999, 1.99e-4 * 0.00005**0.9 + 1e-6),
    ],
)
def test_learning_rates_of_the_protocol(iteration, expected):
    assert math.isclose(learning_rate(check_recipe({"dataset": "voc"}), iteration), expected, rel_tol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_every_setting(tmp_path, monkeypatch, method, setting):
    computing, calls = sptseg.training.run.training_loss, []

    def watch(outputs, *rest, **options):
        calls.append(outputs.masks.shape[1])
        return computing(outputs, *rest, **options)

    monkeypatch.setattr("sptseg.training.run.training_loss", watch)
    recipe = {"method": method, "setting": setting, **(PARTS | OTHERS).get(method, {})}
    if (method, setting) == ("two-stage", "transductive"):
        with pytest.raises(UserError, match="two-stage learns masks without names"):
            tiny(**recipe)
        return
    results = train(tiny(**recipe), tmp_path, progress=False)
    masks = {"inductive": [15, 15], "supervised": [20, 20], "transductive": [15, 20]}[setting]
    assert calls == ([4, 4] if method == "two-stage" else masks)
    rows = results["history"]["train"]
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    terms = {"spt-seg": "ssim", "otseg": "decoder dice", "otseg+": "decoder dice", "projection": "cross-entropy"}
    assert terms.get(method, "dice") in rows[0]
    assert results["metrics"]["pAcc"] is not None and (tmp_path / WEIGHTS).exists()


def test_the_first_half_of_a_transductive_run_is_that_of_an_inductive_one(tmp_path):
    histories, states = {}, {}
    for setting in ("inductive", "transductive"):
        recipe = tiny(setting=setting, iterations=6, warmup_iterations=2)
        histories[setting] = train(recipe, tmp_path / setting, progress=False)["history"]["train"]
        states[setting] = newest(tmp_path / setting)["optimiser"]["state"]
    assert histories["transductive"][:3] == histories["inductive"][:3]
    assert histories["transductive"][3] != histories["inductive"][3]
    steps = {setting: {int(state["step"]) for state in kept.values()} for setting, kept in states.items()}
    assert steps == {"inductive": {6}, "transductive": {3}}, "the second half starts with a fresh optimiser"


def test_the_second_half_of_a_transductive_run_warms_up_again():
    recipe = check_recipe({"dataset": "voc", "setting": "transductive"})
    alone = check_recipe({"dataset": "voc", "iterations": 10_000})
    for iteration in (0, 1, 1499, 1500, 9_999):
        assert learning_rate(recipe, 10_000 + iteration) == learning_rate(alone, iteration)


def test_data_may_move_between_two_parts_of_a_run(tmp_path):
    weights = weights_of(tmp_path, workers=0)
    (tmp_path / RESULTS).unlink()
    assert weights_of(tmp_path, data_root="elsewhere", workers=1) == weights
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data_root"] == "elsewhere"


def test_phases_share_the_iterations():
    assert phases(tiny(iterations=7)) == [(0, 7, "inductive")]
    assert phases(tiny(iterations=7, setting="transductive")) == [(0, 3, "inductive"), (3, 7, "transductive")]


def test_a_failing_evaluation_costs_no_iteration(tmp_path, monkeypatch):
    whole = weights_of(tmp_path / "whole", iterations=4, eval_every=2, checkpoint_every=4)
    with monkeypatch.context() as patch:
        patch.setattr("sptseg.training.evaluations.evaluate_run", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            weights_of(tmp_path / "broken", iterations=4, eval_every=4, checkpoint_every=4)
        assert newest(tmp_path / "broken")["iteration"] == 4
    assert weights_of(tmp_path / "broken", iterations=4, eval_every=4, checkpoint_every=4) == whole
    history = json.loads((tmp_path / "broken" / RESULTS).read_text())["history"]
    assert [row["iteration"] for row in history["val"]] == [4] and len(history["train"]) == 4


def test_a_warm_up_longer_than_the_run_is_noticed(tmp_path):
    with pytest.warns(
        UserWarning, match=r"warmup_iterations 1500: the rate reaches only \d% of lr; set warmup_iterations"
    ):
        train(tiny(warmup_iterations=1500), tmp_path, progress=False)


@pytest.mark.parametrize("value", ["", False, True])
def test_ambiguous_ways_to_write_no_spectral_blocks_are_refused(value):
    with pytest.raises(UserError, match="is ambiguous; write none for no prompts"):
        tiny(spectral_blocks=value)


def test_none_means_no_spectral_prompts(tmp_path):
    assert main(["train", "demo/smoke", "spectral_blocks=", "--out", str(tmp_path / "a")]) != 0
    recipe = tiny(spectral_blocks="none")
    assert recipe.segmenter_config().spectral_blocks == "" and tiny(spectral_blocks=1).spectral_blocks == "1"
    train(recipe, tmp_path / "b", progress=False)
    assert "spectral_blocks: none" in (tmp_path / "b/recipe.yaml").read_text()
    assert recipe_of_run(tmp_path / "b") == recipe


@pytest.mark.parametrize("side", ["height", "width"])
def test_clip_without_training_looks_at_every_pixel(side):
    clip = load_clip("glyph-clip")
    predict = training_free_predictor(
        clip.visual, torch.nn.functional.normalize(torch.randn(6, clip.embed_dim), dim=-1)
    )
    image = torch.randn(1, 3, 103, 103)
    changed = image.clone()
    changed.transpose(2, 3 if side == "width" else 2)[:, :, 96:] = 9
    assert (predict(image, (103, 103)) != predict(changed, (103, 103))).any()


def test_a_run_of_days_is_noticed_at_its_third_iteration(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        sptseg.training.loop, "slow_run_warning", lambda recipe, done, seconds: calls.append((done, seconds))
    )
    row = load_recipe("demo/smoke", iterations=5, eval_every=5, val_images=1, tracker="none")
    train(row, tmp_path / "fast", progress=False)
    assert [done for done, _ in calls] == [3] and 0 < calls[0][1] < 60
    monkeypatch.setattr(
        sptseg.training.loop,
        "slow_run_warning",
        lambda recipe, done, seconds: slow_run_warning(recipe, done, seconds * 1e7),
    )
    with pytest.warns(UserWarning, match=r"s per iteration: the remaining 2 take about .* days.*own-data/starter"):
        train(row, tmp_path / "slow", progress=False)


@pytest.mark.parametrize(("seconds", "days"), [(4.3, None), (4.4, "1.0"), (70, "16.2")])
def test_the_days_that_are_left(seconds, days):
    text = slow_run_warning(Recipe(dataset="folder", iterations=20_000), 3, seconds)
    assert (text is None) == (days is None) and (days is None or f"19,997 take about {days} days" in text)
