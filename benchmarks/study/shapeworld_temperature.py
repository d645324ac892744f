"""Softmax-TB on ShapeWorld over inverse temperatures in nats, for a convention of the log-density.

Each run is `diffalign train shapeworld_tmpo --objective.beta=BETA --policy.kernel.density=DENSITY`, the demo otherwise, into
FOLDER/DENSITY-BETA; a run whose folder has its last evaluation is not made again. Five minutes a run on one free core. Printed: the change
of the held-out rewards and of L-GMD, with 95 % intervals over prompts.

Args:
    folder: of the runs
    only: runs, DENSITY:BETA each
    seed: of every run
    json: also write the numbers here
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import Record
from diffalign.evaluation import paired_change
from diffalign.evaluation.recorded import by_prompt

RUNS = ("mean:5", "mean:20", "mean:60")
SHOWN = (("reward", "rewards", "CountReward"), ("exact", "rewards", "exact"), ("L-GMD", "diversity", "l_gmd"))
"""Column, and where `evaluation.json` has it by prompt."""


def changes(folder: Path) -> dict[str, list[float]] | None:
    """Column -> mean change from the first evaluation to the last and the ends of its interval; None where the run is not complete."""
    file = folder / "evaluation.json"
    entries: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    if len(entries) < 2:
        return None
    row = {}
    for column, kind, name in SHOWN:
        change = paired_change(by_prompt(entries[0], kind, name), by_prompt(entries[-1], kind, name))
        row[column] = [change.mean, change.low, change.high]
    return row


def main(folder: Path, only: tuple[str, ...] = RUNS, seed: int = 0, json: Path | None = None) -> None:
    record = Record(json, {"seed": seed})
    print(f"{'density':<10}{'beta':>6}" + "".join(f"{column:>26}" for column, _, _ in SHOWN))
    for run in only:
        density, beta = run.split(":")
        place = folder / f"{density}-{beta}"
        if changes(place) is None:
            command = ["diffalign", "train", "shapeworld_tmpo", f"--objective.beta={beta}", f"--policy.kernel.density={density}"]
            command += [f"--seed={seed}", f"--folder={place}"]
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        row = changes(place)
        assert row is not None
        numbers = "".join(f"{mean:>+10.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in row.values())
        print(f"{density:<10}{beta:>6}{numbers}", flush=True)
        record.content.setdefault("runs", {})[run] = row
        record.save()
