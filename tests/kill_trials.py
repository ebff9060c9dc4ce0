"""Kill a training at random moments, many times, and compare its end with that of an undisturbed one.

    python tests/kill_trials.py --kills 20

Takes some minutes. Exits with 1 if weights, best weights, metrics or history differ in a single bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from sptseg.training.checkpoint import checkpoints
from sptseg.training.run_folder import BEST, RESULTS, WEIGHTS

SETTINGS = ["setting=transductive", "iterations=160", "checkpoint_every=1", "eval_every=5", "val_images=4"]


def start(out: Path) -> subprocess.Popen:
    """Start the run, or go on with it."""
    command = [sys.executable, "-m", "sptseg.cli", "train", "demo/smoke", "--quiet", *SETTINGS, "--out", str(out)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def newest(out: Path) -> str:
    """Name of the newest checkpoint."""
    return checkpoints(out)[0].name if checkpoints(out) else "no checkpoint"


def kill_at_random(out: Path, patience: float, chance: random.Random) -> bool:
    """Start the run and kill it at a random moment; false if it ended before."""
    process, wait = start(out), chance.uniform(0, 1)
    before = newest(out)
    while process.poll() is None and newest(out) == before and wait > 0.1:  # a tenth is killed while it still loads
        time.sleep(0.001)
    time.sleep(patience * chance.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def outcome(out: Path) -> dict[str, bytes | dict]:
    """What must be equal."""
    results = json.loads((out / RESULTS).read_text())
    kept = {key: results[key] for key in ("metrics", "best", "history")}
    return {**kept, **{name: (out / name).read_bytes() for name in (WEIGHTS, BEST)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder) / "killed", Path(folder) / "whole"
        assert start(whole).wait() == 0
        stopped_at = []
        with tqdm(total=arguments.kills, desc="kills") as bar:
            while len(stopped_at) < arguments.kills and kill_at_random(killed, 0.5, chance):
                stopped_at.append(newest(killed))
                bar.update()
        assert start(killed).wait() == 0
        found, expected = outcome(killed), outcome(whole)
        differing = [name for name in expected if found[name] != expected[name]]
        print(f"{len(stopped_at)} kills, after: {', '.join(stopped_at)}")
        print(
            f"differ: {', '.join(differing)}" if differing else "weights, best weights, metrics and history are equal"
        )
    return 1 if differing or len(stopped_at) < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
