"""What the GPU check asks of the machine: memory that runs out, the demo, rounding of convolutions, several runs at once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.breaking.gpu_subjects import Options, Row, embedded, forest_of
from diffalign import AlignmentLoop
from diffalign.core import Hook, StandardizedSum, check_first_step
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import PromptFile
from diffalign.samplers import ChainSampler
from diffalign.shapeworld import CountReward


def memory(options: Options) -> Iterator[Row]:
    if not options.device.startswith("cuda"):
        yield {"case": "out of memory", "ok": True, "skipped": "needs CUDA's allocator"}
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.mem_get_info()[1]
    policy = embedded(options)
    loop = AlignmentLoop(
        SoftmaxTB(policy),
        ChainSampler(6, 64),
        CountReward(),
        PromptFile("shapeworld/count"),
        prompts_per_step=2,
        aggregation=StandardizedSum(),
    )
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
    try:
        loop.advance(2)  # `run` would fill the memory from few rows on
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield {
        "case": "out of memory",
        "ok": loop.objective.rows is not None,
        "objective.rows": loop.objective.rows,
        "sampler.rows": loop.sampler.rows,
        "peak_MiB": round(torch.cuda.max_memory_allocated() / 2**20),
    }


def demo(options: Options) -> Iterator[Row]:
    from diffalign import config

    with tempfile.TemporaryDirectory() as place:
        words = ["--policy.device", options.device, "--total", str(options.steps), "--folder", place]
        words += ["--evaluation", "null", "--hooks", "[]"]
        words += ["--prompts_per_step", "1", "--sampler.plan.branches", "2"] if options.tiny else []
        loop = config.parse("shapeworld_tmpo", words).build()
        seconds: list[float] = []
        begun = time.perf_counter()

        class Watch(Hook):
            def step(self, loop: AlignmentLoop, report: Any) -> None:
                nonlocal begun
                seconds.append(time.perf_counter() - begun)
                begun = time.perf_counter()

        loop.hooks = [Watch()]
        loop.run(options.steps)
        parts = {name: round(value / options.steps, 4) for name, value in loop.ledger.seconds.items()}
        yield {
            "case": "TMPO",
            "ok": True,
            "median_s": sorted(seconds)[len(seconds) // 2],
            "first_s": seconds[0],
            **parts,
            "waits": loop.ledger.waits,  # of the third step
        }


def tf32(options: Options) -> Iterator[Row]:
    if not options.device.startswith("cuda"):
        yield {"case": "convolutions", "ok": True, "skipped": "needs CUDA's convolutions"}
        return
    policy = embedded(options)
    for allowed in (True, False):
        torch.backends.cudnn.allow_tf32 = allowed
        forest = forest_of(policy, ChainSampler(8, 9), 24)
        found, part = check_first_step(policy, forest), check_first_step(policy, forest, step=2, rows=2)
        yield {"case": f"TF32 in convolutions: {allowed}", "ok": found.deviation == 0.0, "part": part.deviation, "rounding": found.rounding}


def together(options: Options) -> Iterator[Row]:
    if not options.device.startswith("cuda"):
        yield {"case": "several runs at once", "ok": True, "skipped": "needs a GPU and its many cores"}
        return
    for runs, threads in ((1, None), (3, None), (3, os.cpu_count())):
        with tempfile.TemporaryDirectory() as place:
            codes = _trained(options.device, [Path(place, str(run)) for run in range(runs)], threads)
            files = [Path(place, str(run), "metrics.jsonl") for run in range(runs)]
            steps = [[json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [] for file in files]
        took = [sum(value for name, value in line.items() if name.startswith("seconds/")) for run in steps for line in run[1:]]
        yield {
            "case": f"{runs} at once, {'the threads that a run takes' if threads is None else f'{threads} threads each'}",
            "ok": threads is not None or codes == [0] * runs,
            "codes": codes,
            "steps": [len(run) for run in steps],
            "median_s": sorted(took)[len(took) // 2] if took else None,
        }


def _trained(device: str, folders: list[Path], threads: int | None, limit: float = 45.0) -> list[int | None]:
    """Exit codes of runs that begin at once; None for one that is not through in time."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "diffalign", "train", "shapeworld_tmpo", "--policy.device", device, "--total", "10"]
    words += ["--evaluation", "null", "--hooks", "[]", "--average", "null"]
    begun = [subprocess.Popen([*words, "--folder", str(folder)], env=environment, stdout=subprocess.DEVNULL) for folder in folders]
    end, codes = time.perf_counter() + limit, []
    for process in begun:
        try:
            codes.append(process.wait(max(1.0, end - time.perf_counter())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(None)
    return codes
