"""Trains the ring for thousands of steps in one process and watches memory and files.

Memory is what the process holds (resident set) after a garbage collection, at the end of the warm-up and at the end; files are those of
the run folder, of which only the metrics may grow, by one line a step.

Args:
    steps: of the run; the first quarter warms up
"""

import gc
import json
import tempfile
from pathlib import Path

import attrs

from benchmarks.breaking.small_run import small_run
from diffalign.core import AlignmentLoop, Hook, Report
from diffalign.runs.checkpoints import Checkpoints
from diffalign.runs.recording import Recorder

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
    watch = Watch(every=max(1, steps // 20))
    hooks = [Recorder(folder, "", "soak"), Checkpoints(folder, every=max(1, steps // 20), keep=2), watch]
    small_run(hooks, folder, updates=2, rows=5).run(steps)
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


def main(steps: int = 2000) -> int:
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), steps, steps // 4)
    print(json.dumps(result, indent=1))
    return 0 if result["growth"] < LIMIT else 1
