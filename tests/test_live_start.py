"""A live start: dead tokens are negated, and nothing else changes."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sptseg.models.decoder import kept_share, selections
from sptseg.models.recording import recorded
from sptseg.recipe import check_recipe
from sptseg.training import run as run_module
from sptseg.training.dead_start import turn_dead_tokens
from sptseg.training.loop import make_accelerator, train
from sptseg.training.run import Run
from test_dead_start import IMAGES, TEXT, TINY, make

LIVE, DEAD = 1, 4  # seeds, see `test_the_seeds_are_what_they_are_called`
RECIPE = {**TINY, "decoder_layers": 2, "live_start": True}


def started(tmp_path, **changes):
    """A run before its first iteration."""
    recipe = check_recipe({**RECIPE, **changes})
    return Run(recipe, tmp_path, make_accelerator(recipe, tmp_path), progress=False)


def tokens(run):
    return [selection.task_token.detach().clone() for selection in selections(run.segmenter).values()]


def trained(folder, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = train(check_recipe({**RECIPE, **changes}), folder, progress=False)
    return results["history"]["train"], load_file(folder / "model.safetensors")


def equal(one, other):
    losses = one[0] == other[0]
    return losses and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize(("signs", "count"), [((1, 1), 0), ((-1, 1), 1), ((1, -1), 1), ((-1, -1), 2)])
def test_every_layer_is_judged_by_itself(signs, count):
    model = make(*signs)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    turned = turn_dead_tokens(model.train(), IMAGES, TEXT, lambda value: value, parts=2)
    assert len(turned) == count and model.training and torch.equal(state, torch.get_rng_state())
    for name, tensor in model.named_parameters():
        sign = -1 if name.removesuffix(".task_token") in turned else 1
        assert torch.equal(tensor, sign * before[name])
    with recorded(selections(model), kept_share) as shares:
        model.eval()(IMAGES, TEXT)
    assert all(share > 0.5 for [share] in shares.values())
    assert not turn_dead_tokens(model, IMAGES, TEXT, lambda value: value), "a second time turns nothing"


def test_patches_that_another_process_keeps_count():
    assert not turn_dead_tokens(make(-1, -1), IMAGES, TEXT, lambda value: value + 0.25)
    assert not turn_dead_tokens(make(method="zegclip"), IMAGES, TEXT, lambda value: value)


def test_the_seeds_are_what_they_are_called(tmp_path):
    for seed, sign in ((LIVE, 1), (DEAD, -1)):
        released, live = started(tmp_path, seed=seed, live_start=False), started(tmp_path, seed=seed)
        for one, other in zip(tokens(released), tokens(live), strict=True):
            assert torch.equal(one, sign * other), f"seed {seed}"


def test_a_living_seed_trains_bit_for_bit_as_without(tmp_path):
    runs = [trained(tmp_path / str(live), seed=LIVE, live_start=live, dropout=0.1) for live in (True, False)]
    assert equal(*runs)


def test_a_dead_seed_learns(tmp_path):
    (live, weights), (dead, _) = (trained(tmp_path / str(on), seed=DEAD, live_start=on) for on in (True, False))
    assert live[0]["loss"] != dead[0]["loss"] and live[2]["loss"] != live[0]["loss"]


def test_resuming_turns_nothing_again(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", seed=DEAD, checkpoint_every=1)

    def stop(run, batch, setting, step=run_module.step):
        if run.done == 2:
            raise KeyboardInterrupt
        step(run, batch, setting)

    with monkeypatch.context() as patch:
        patch.setattr("sptseg.training.loop.step", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", seed=DEAD, checkpoint_every=1)
    assert list(Path(tmp_path / "parts").glob("checkpoint-000002.pt"))
    assert equal(trained(tmp_path / "parts", seed=DEAD, checkpoint_every=1), whole)


def test_given_weights_stay(tmp_path):
    trained(tmp_path / "first", seed=DEAD, live_start=False, iterations=1, eval_every=1, lr=1e-12, min_lr=1e-12)
    weights = tmp_path / "first" / "model.safetensors"
    run = started(tmp_path / "second", seed=DEAD, init_from=str(weights))
    stored = load_file(weights)
    for name, selection in selections(run.segmenter).items():
        assert torch.equal(selection.task_token, stored[f"{name}.task_token"])


def test_two_processes_start_as_one(tmp_path):
    one, two = (trained(tmp_path / str(count), seed=DEAD, n_proc=count) for count in (1, 2))
    for first, second in zip(one[0], two[0], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
