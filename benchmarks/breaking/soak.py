"""Trains the ring for thousands of steps in one process and watches memory and files.

    python benchmarks/soak.py --steps 2000

Memory is what the process holds (resident set) after a garbage collection, at the end of the warm-up and at the end; files are those of
the run folder, of which only the metrics may grow, by one line a step.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import attrs
import torch

from diffalign.core import AlignmentLoop, Average, Hook, Report, StandardizedSum
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints
from diffalign.runs.recording import Recorder
from diffalign.samplers import FixedPlan, TreeSampler

LIMIT = 0.02


def resident() -> int:
    """Bytes that the process holds now (Linux)."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@attrs.define(eq=False)
class Watch(Hook):
    """Notes the memory every `every` steps."""

    every: int
    seen: list[tuple[int, int]] = attrs.field(factory=list)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if (report.step + 1) % self.every == 0:
            self.seen.append((report.step + 1, resident()))


def soak(folder: Path, steps: int, warm_up: int) -> dict[str, float]:
    """Growth of memory after the warm-up as a share of what it was then, files and bytes of the run folder."""
    modes = [[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]]
    watch = Watch(every=max(1, steps // 20))
    loop = AlignmentLoop(
        SoftmaxTB(GaussianMixturePolicy(modes, 0.3), updates=2, rows=5),
        TreeSampler(6, FixedPlan(splits=(1, 2))),
        lambda images, prompts: images[:, 0, 0, 0],
        Prompts(["left", "right", "up"]),
        StandardizedSum(),
        prompts_per_step=2,
        average=Average(0.9),
        folder=folder,
        hooks=[Recorder(folder, "", "soak"), Checkpoints(folder, every=max(1, steps // 20), keep=2), watch],
    )
    loop.run(steps)
    warm = next(held for step, held in watch.seen if step >= warm_up)
    files = [file for file in folder.rglob("*") if file.is_file()]
    other = [file for file in files if file.name not in ("metrics.jsonl", "report.html")]
    return {
        "steps": steps,
        "memory_after_warm_up": warm,
        "memory_at_the_end": watch.seen[-1][1],
        "growth": watch.seen[-1][1] / warm - 1,
        "files": len(files),
        "bytes_of_metrics_a_step": (folder / "metrics.jsonl").stat().st_size / steps,
        "bytes_of_other_files": sum(file.stat().st_size for file in other),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.steps, options.steps // 4)
    print(json.dumps(result, indent=1))
    raise SystemExit(0 if result["growth"] < LIMIT else 1)


if __name__ == "__main__":
    main()
