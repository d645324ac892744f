"""Kills a run with SIGKILL at random moments, resumes it each time, and compares the end with a run that nobody disturbed.

A child trains the ring (a Gaussian mixture, milliseconds a step) with a checkpoint after every step, so that many of the moments lie
inside the writing of one. After each kill the parent looks at the run folder: every line of the metrics must be whole, and there must be
a checkpoint to go on from, unless none was due yet.

Args:
    kills: in all
    steps: of a run
    seed: of the moments
"""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import attrs
import torch

from benchmarks.breaking.small_run import small_run
from diffalign.core import AlignmentLoop
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints
from diffalign.runs.recording import Recorder
from diffalign.runs.snapshot import checkpoints, name_complete


@attrs.define
class Tally:
    """What the kills met.

    Args:
        runs: that were trained to their end
        kills: children that were killed on the way
        writing: of them, while a checkpoint or the best was being written or removed
        before: of them, before the first checkpoint
        damaged: checkpoints that had to be passed over
        torn: lines of metrics that were not whole
        lost: kills after which there was nothing to go on from, although a checkpoint had been written before
        equal: whether every end is that of an undisturbed run, bit for bit
    """

    runs: int = 0
    kills: int = 0
    writing: int = 0
    before: int = 0
    damaged: int = 0
    torn: int = 0
    lost: int = 0
    equal: bool = False


def ring(folder: Path | None) -> AlignmentLoop:
    return small_run([] if folder is None else [Recorder(folder, "", "ring"), Checkpoints(folder, every=1, keep=2)])


def resume(folder: Path, total: int) -> None:
    """What `diffalign train --resume` does. A run that was killed in its first save begins anew."""
    loop = ring(folder)
    name_complete(folder)
    start = loop.hooks[1].restore(loop) if complete_checkpoints(folder, quiet=True) or checkpoints(folder) else 0
    loop.run(total, start)


def child(folder: Path, total: int, pipe: int) -> None:
    """Train to the end, then say so; never returns."""
    try:
        resume(folder, total)
        os.write(pipe, b"done")
    finally:
        os._exit(0)


def study(folder: Path, kills: int, steps: int, seed: int = 0) -> Tally:
    """Train in children that are killed, run after run, until there were enough kills; each run is brought to its end and compared."""
    tally, moments = Tally(equal=True), random.Random(seed)
    start = time.monotonic()
    resume(folder / "calibration", steps)
    longest = (time.monotonic() - start) / 3
    expected = ring(None)
    expected.run(steps)
    while tally.kills < kills:
        tally.runs += 1
        run = folder / f"run-{tally.runs}"
        disturb(run, steps, kills, longest, moments, tally)
        resume(run, steps)
        tally.equal &= is_equal(run, expected, steps)
    return tally


def disturb(folder: Path, steps: int, kills: int, longest: float, moments: random.Random, tally: Tally) -> None:
    """Kill one run again and again, until it comes to its end or there were enough kills."""
    folder.mkdir(parents=True)
    had = False
    while tally.kills < kills:
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            child(folder, steps, write)
        os.close(write)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        finished = bool(os.read(read, 4))
        os.close(read)
        if finished:
            return
        tally.kills += 1
        tally.writing += any(folder.glob("*.tmp"))
        named = checkpoints(folder)
        whole = complete_checkpoints(folder, quiet=True)
        tally.before += not whole
        tally.damaged += len(set(named) - set(whole))
        tally.lost += had and not whole
        had = had or bool(whole)
        metrics = folder / "metrics.jsonl"
        tally.torn += sum(not is_whole(line) for line in (metrics.read_text().splitlines() if metrics.exists() else ()))


def is_equal(folder: Path, expected: AlignmentLoop, steps: int) -> bool:
    """Whether the last checkpoint holds the expected weights, and the metrics one line for each step."""
    again = ring(folder)
    again.hooks[1].restore(again)
    for role, policy in expected.policies().items():
        pairs = zip(policy.parameters(), again.policies()[role].parameters(), strict=True)
        if not all(torch.equal(mine, other) for mine, other in pairs):
            return False
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines == list(range(steps))


def is_whole(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except json.JSONDecodeError:
        return False


def main(kills: int = 100, steps: int = 24, seed: int = 0) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tally = study(Path(folder), kills, steps, seed)
    for name, value in attrs.asdict(tally).items():
        print(f"{name:<8} {value}")
    return 0 if tally.equal and not (tally.torn or tally.lost) else 1
