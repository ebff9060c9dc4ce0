"""Training by several processes: the same result as by one, errors that arrive, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sptseg.core import UserError
from sptseg.recipe import check_recipe
from sptseg.training.launch import run_in_processes
from sptseg.training.loop import train
from sptseg.training.run_folder import RESULTS, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    **{"dataset": "glyphs-20", "image_size": 32, "num_prompts": 2, "decoder_layers": 2, "train_images": 12},
    **{"val_images": 5, "iterations": 3, "batch_size": 4, "warmup_iterations": 0, "lr": 1e-3, "dropout": 0.0},
}
WAYS = {
    "processes": {"n_proc": 2},
    "micro-batches": {"gradient_accumulation_steps": 4},
    "both": {"n_proc": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


def trained(out, **changes):
    return train(check_recipe({**TINY, **changes}), out, progress=False), load_file(out / WEIGHTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs in one process and in one piece, by method and setting."""
    made = {}

    def get(**changes):
        key = json.dumps(changes)
        if key not in made:
            made[key] = trained(tmp_path_factory.mktemp("whole"), **changes)
        return made[key]

    return get


def check_equal(found, expected):
    """Losses agree but for rounding; Adam turns rounding of gradients near zero into steps of at most the rate."""
    rows = [[row["loss"] for row in results["history"]["train"]] for results, _ in (found, expected)]
    assert torch.allclose(*map(torch.tensor, rows), rtol=2e-4)
    assert rows[0][0] == pytest.approx(rows[1][0], rel=2e-6), "of the first batch, before any step"
    assert found[1].keys() == expected[1].keys()
    off = [(tensor - expected[1][name]).abs() for name, tensor in found[1].items()]
    differences = torch.cat([tensor.flatten() for tensor in off])
    assert differences.max() <= 6e-3 and differences.quantile(0.99) < 1e-5


ZEGCLIP, TRANSDUCTIVE = {"method": "zegclip"}, {"setting": "transductive", "iterations": 4}
OTSEG = {"method": "otseg+", "transport_stop": "image", **TRANSDUCTIVE}  # "batch" depends on the parts
PARTS = [
    ("processes", TRANSDUCTIVE),
    ("both", ZEGCLIP),
    ("both", OTSEG),
    ("micro-batches", ZEGCLIP),
    ("micro-batches", TRANSDUCTIVE),
]
CLIP_RC = {"method": "clip-rc", "regions": 2}
CASCADE = {"method": "cascade-clip", "tapped_blocks": "2-3", **TRANSDUCTIVE}
PARTS += [("processes", CLIP_RC), ("processes", CASCADE)]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "changes"), PARTS)
def test_parts_of_a_batch_make_the_whole(tmp_path, whole, way, changes):
    expected = whole(**changes)
    found = trained(tmp_path, **changes, **WAYS[way])
    check_equal(found, expected)
    assert found[0]["processes"] == WAYS[way].get("n_proc", 1)


def test_gradient_checkpointing_changes_no_bit(tmp_path, whole):
    changes = {"iterations": 2, "dropout": 0.1}
    (expected, weights), (found, again) = whole(**changes), trained(tmp_path, **changes, gradient_checkpointing=True)
    assert found["history"] == expected["history"]
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_the_batch_must_divide(tmp_path):
    with pytest.raises(
        UserError, match="batch_size: 4 cannot be shared by 1 processes with 3 gradient_accumulation_steps"
    ):
        trained(tmp_path, gradient_accumulation_steps=3)


def count_images(out):
    """In each of several processes: evaluate random labels of five images, and give the counts."""
    from accelerate import Accelerator

    from sptseg.data.benchmarks import load_benchmark
    from sptseg.evaluation.evaluate import eval_loader as make_loader
    from sptseg.evaluation.metrics import SegmentationMetrics

    accelerator = Accelerator(cpu=True)
    benchmark = load_benchmark("glyphs-20", size=32, val_images=5)
    metrics, names = SegmentationMetrics(benchmark.labels), []
    for _, mask, name in make_loader(benchmark, 32, 0, accelerator.process_index, accelerator.num_processes):
        guess = torch.randint(20, mask[0].shape, generator=torch.Generator().manual_seed(sum(map(ord, *name))))
        metrics.update(guess, mask[0])
        names += name
    return names, metrics.confusion.compute().tolist()


@pytest.mark.slow
def test_evaluation_counts_every_image_once():
    names, alone = count_images(None)
    shared, counts = run_in_processes(count_images, (None,), 2)
    assert len(names) == 5 and shared == names[::2]
    assert counts == alone


@pytest.mark.slow
def test_more_processes_than_gpus_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="n_proc: 4 processes need a GPU each, and 2 are here; use n_proc=2"):
        train(check_recipe({**TINY, "n_proc": 4}), tmp_path, progress=False)


def test_a_mistake_in_a_process_is_the_same_line(tmp_path):
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"^spectral_blocks: '2-1' is not a range of blocks within 1-4") as error:
            trained(tmp_path / str(processes), spectral_blocks="2-1", n_proc=processes)
        assert "\n" not in str(error.value)


def fail_in_the_second():
    if os.environ["RANK"] == "1":
        raise ArithmeticError("one and one is three")
    time.sleep(60)


@pytest.mark.slow
def test_an_error_arrives_with_its_traceback_and_ends_all():
    start, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="process 1: ArithmeticError: one and one is three") as error:
        run_in_processes(fail_in_the_second, (), 2)
    assert "in fail_in_the_second" in str(error.value) and time.monotonic() - start < 50
    assert signal.getsignal(signal.SIGINT) is handler


def processes_of(marker):
    """Numbers of the processes whose command line or environment has a word, without this one."""
    found = []
    for folder in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{folder}/environ", "rb") as file:
                if marker.encode() in file.read() and int(folder) != os.getpid():
                    found.append(int(folder))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc to look for processes")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_no_process_survives_the_one_that_started_it(tmp_path, kill):
    marker = f"MARK_{tmp_path.parent.name}_{kill}=1"
    command = [sys.executable, "-m", "sptseg.cli", "train", "demo/smoke", "--quiet", "--out", str(tmp_path / "run")]
    settings = ["n_proc=2", "iterations=100000", "checkpoint_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", marker.split("=")[0]: "1"}
    process = subprocess.Popen(
        [*command, *settings],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*.pt")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    assert len(processes_of(marker)) >= 3
    process.send_signal(kill)
    process.wait(timeout=60)
    while processes_of(marker) and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    assert not processes_of(marker)


def torchrun(out, settings, *options, **pipes):
    """A running `torchrun … sptseg train` of two processes in all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", *options, "-m", "sptseg.cli"]
    values = [f"{key}={value}" for key, value in settings.items() if key != "dataset"]
    command += ["train", "demo/smoke", "--quiet", "--out", str(out), *values]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **pipes)


@pytest.mark.slow
def test_torchrun_trains_once_and_continues(tmp_path, whole):
    expected = whole(method="zegclip")
    one_node = ("--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0")
    for _ in range(2):  # the second time it is finished already
        run = torchrun(tmp_path, {**TINY, "method": "zegclip"}, *one_node, stdout=subprocess.PIPE)
        printed = run.communicate()[0]
        assert run.returncode == 0 and printed.count("weights and results") == 1, "the first process speaks for all"
    check_equal((json.loads((tmp_path / RESULTS).read_text()), load_file(tmp_path / WEIGHTS)), expected)


@pytest.mark.slow
def test_two_nodes_are_as_one(tmp_path, whole):
    """Two nodes that find each other as in the README, though both are on this computer."""
    expected = whole(method="zegclip")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "run", "--rdzv-endpoint", f"localhost:{port}")
    nodes = [torchrun(tmp_path, {**TINY, "method": "zegclip"}, *node, stdout=subprocess.PIPE) for _ in range(2)]
    printed = "".join(run.communicate()[0] for run in nodes)
    assert [run.returncode for run in nodes] == [0, 0] and printed.count("weights and results") == 1
    check_equal((json.loads((tmp_path / RESULTS).read_text()), load_file(tmp_path / WEIGHTS)), expected)
