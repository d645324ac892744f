"""Seconds of a TMPO step on the embedded pipeline, whose calls are small: as it is, with recorded calls, and with rewards in processes.

The run file `shapeworld_tmpo` with 16 prompts x 9 samples, without evaluation and hooks. Prints seconds a step and network rows a second
(of rollout, contract and update), the seconds of each stage, and the reward after the last step, which is the same for all.

Args:
    device: of the network
    prompts: of a step
    workers: numbers of processes that score
    steps: that are timed, after four that warm up
    gradients: also with recorded calls with gradient
    json: also write the numbers here, after each
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.tree_steps import synchronize
from benchmarks.record import write
from diffalign import AlignmentLoop, config

WARM_UP = 4
FIXED = ("--total=1000", "--evaluation=null", "--hooks=[]", "--average=null", "--chunk=144")


def built(device: str, prompts: int, folder: str, *words: str) -> AlignmentLoop:
    given = [f"--policy.device={device}", f"--prompts_per_step={prompts}", f"--folder={folder}", *FIXED, *words]
    return config.parse("shapeworld_tmpo", given).build()


def measured(loop: AlignmentLoop, steps: int) -> dict[str, Any]:
    device = loop.objective.policy.device
    loop.advance(WARM_UP)
    before = {name: dict(getattr(loop.ledger, name)) for name in ("seconds", "rows")}
    synchronize(device)
    begin = time.perf_counter()
    loop.advance(WARM_UP + steps, WARM_UP)
    synchronize(device)
    step = (time.perf_counter() - begin) / steps
    seconds, rows = (
        {stage: (number - before[name].get(stage, 0)) / steps for stage, number in getattr(loop.ledger, name).items()}
        for name in ("seconds", "rows")
    )
    return {
        "step_s": round(step, 4),
        "rows_per_s": round(sum(rows.values()) / step),
        "rows": sum(rows.values()),
        "stages": {name: round(number, 4) for name, number in seconds.items()},
        "reward": loop.reward,
    }


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    prompts: int = 16,
    workers: tuple[int, ...] = (4, 8),
    steps: int = 12,
    gradients: bool = False,
    json: Path | None = None,
) -> None:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "prompts": prompts, "ways": {}}
    recorded = "--policy.graphs={}"
    ways = {"as it is": ("--policy.graphs=null",), "recorded": (recorded,)}
    ways |= {"recorded, gradients too": ("--policy.graphs={gradients: true}",)} if gradients else {}
    for count in workers:
        scored = f"--rewards={{class_path: WorkerReward, init_args: {{reward: 'diffalign.shapeworld:CountReward', workers: {count}}}}}"
        ways[f"recorded, {count} workers"] = (recorded, scored)
    for way, words in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            row = measured(built(device, prompts, folder, *words), steps)
        found["ways"][way] = row
        stages = "  ".join(f"{stage} {number:.4f}" for stage, number in row["stages"].items())
        print(f"{way:24s} {row['step_s']:7.4f} s a step {row['rows_per_s']:6d} rows/s  reward {row['reward']:.6f}  {stages}", flush=True)
        write(json, found)
