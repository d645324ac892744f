"""What must be true on a GPU, in one call: every part runs there, the contract tells true from false, resume is exact, and more.

python benchmarks/gpu_check.py [--only PART ...] [--large flux sd3] [--settings 6] [--json FILE] [--device cuda]

  matrix      device_matrix.py on the device, in float64, against the CPU
  contract    samplers, kernels, grids of 4 to 28 steps, row budgets, prompts and types on the embedded pipeline: never refused
  faults      every planted fault at every level, in every type: always refused
  attention   forward and backward of FLUX.1-dev's and SD3.5-M's shapes under each attention kernel, a process each (attention_probe.py)
  resume      a run that was stopped and resumed has the weights of one that was not, bit for bit
  memory      a step that runs out of memory halves its rows and goes on
  demo        some steps of the built-in TMPO run; seconds a step, and how often the host waits for the device
  tf32        what TF32 in convolutions does to a replay in another batch shape
  together    three runs at once: seconds a step, with the threads that a run takes, and with one for each core; only if it is named

Prints a table, writes JSON, and ends with 1 if something fails. Every part runs without a GPU too (--device far is the pretended one).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from device_matrix import CASES, gap
from gpu_machine import demo, memory, tf32, together
from gpu_subjects import Row, embedded, forest_of
from random_families import TINY_FLUX, TINY_SD35, condition_of, policy_of

from diffalign import AlignmentLoop, Progress, Streams
from diffalign.core import (
    CPS,
    UNRECORDED,
    ContractError,
    FlowSDE,
    Guided,
    Hook,
    Interrupted,
    Policy,
    StandardizedSum,
    TrajectorySampler,
    check_first_step,
)
from diffalign.objectives import SoftmaxTB, SurrogateReward
from diffalign.policies import TDMPolicy
from diffalign.prompts import PromptFile
from diffalign.runs.checkpoints import Checkpoints
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, TreeSampler
from diffalign.shapeworld import CountReward
from diffalign.testing import second_device
from diffalign.testing.broken import FAULTS, BrokenReplay

HERE = Path(__file__).parent


def matrix(options: argparse.Namespace) -> Iterator[Row]:
    for name, case in list(CASES.items())[:: options.every]:
        found = gap(case, options.device, torch.float64)
        yield {"case": name, "ok": found < 1e-6, "gap": found}  # images and scores are float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in ("SoftmaxTB, three updates, rows 2", "FlowGRPO, rows 2"):
            yield {"case": f"{name}, {dtype}", "ok": True, "gap": gap(CASES[name], options.device, dtype)}


def contract(options: argparse.Namespace) -> Iterator[Row]:
    for dtype in ("float32", "bfloat16", "float16")[: 1 if options.quick else 3]:
        for name, kernel in (("CPS", CPS()), ("FlowSDE", FlowSDE()))[: 2 if dtype == "float32" and not options.quick else 1]:
            policy = embedded(options, dtype, kernel=kernel)
            for steps in (4, 10, 28) if not options.tiny else (4,):
                samplers = {"chain": lambda rows, steps=steps: ChainSampler(steps, 3, rows=rows)}
                if steps >= 6:
                    samplers["tree"] = lambda rows, steps=steps: TreeSampler(steps, FixedPlan((1, 2, 3)), rows=rows)
                for kind, make in samplers.items():
                    for rows, prompts in ((1, 1), (3, 2), (None, 2), (None, 24), (None, 64))[: 2 if options.quick else 5]:
                        if (steps == 28 and (rows, prompts) != (None, 2)) or (prompts > 2 and (options.tiny or steps != 10)):
                            continue
                        where = f"{dtype}, {name}, {kind} of {steps}, rows {rows}, {prompts} prompts"
                        forest = forest_of(policy, make(rows), prompts)
                        try:
                            found = check_first_step(policy, forest)
                            part = check_first_step(policy, forest, step=1, rows=2)
                        except ContractError as error:
                            yield {"case": where, "ok": False, "error": str(error)}
                        else:
                            yield {
                                "case": where,
                                "ok": True,
                                "deviation": found.deviation,
                                "rounding": found.rounding,
                                "part": part.deviation,
                            }

    for shape in (TINY_FLUX, TINY_SD35):  # the grids of their schedulers
        for dtype in ("float32", "bfloat16")[: 1 if options.quick else 2]:
            policy = policy_of(shape, getattr(torch, dtype), options.device)
            with torch.no_grad():
                sampler = ChainSampler(4 if options.tiny else 28, 3)
                forest = sampler.sample(policy, condition_of(shape, policy), Progress(0, 1), Streams(3))
            found, part = check_first_step(policy, forest), check_first_step(policy, forest, step=1, rows=2)
            numbers = {"deviation": found.deviation, "rounding": found.rounding, "part": part.deviation}
            yield {"case": f"{dtype}, {shape.name}, its own grid", "ok": True, **numbers}


def faults(options: argparse.Namespace) -> Iterator[Row]:
    steps = 4 if options.tiny else 6
    for dtype in ("float32", "bfloat16", "float16")[: 1 if options.tiny else 3]:
        plain = embedded(options, dtype)
        for fault in FAULTS:
            if fault == "type" and (dtype != "float32" or options.device == "far"):
                continue  # the planted one is autocast around a float32 network, which the pretended device does not have
            policy: Policy = Guided(plain, 3.0) if fault == "guidance" else plain
            sampler = ChainSampler(steps, 3)
            calls = sampler.branching().children
            wrong = BrokenReplay(policy, fault, len(calls))
            forest = forest_of(wrong, sampler, 2)
            numbers = len(set(forest.call.tolist()) - {UNRECORDED})
            missed, said = [], ""
            for call in range(1, numbers + 1):
                try:
                    check_first_step(wrong, forest, step=call)
                    missed.append(call)
                except ContractError as error:
                    said = str(error).rpartition("It looks like ")[2]
            yield {"case": f"{dtype}, {fault}", "ok": not missed, "missed": missed, "calls": numbers, "says": said[:60]}


def attention(options: argparse.Namespace) -> Iterator[Row]:
    default, every = "flash+efficient+math", "flash+efficient+cudnn+math"
    settings = [(default, "float32", []), (every, "float32", []), ("cudnn+math", "bfloat16", []), ("efficient+math", "float32", [])]
    settings += [(every, "float32", ["--tokens", str(tokens)]) for tokens in (448, 640)]
    for shape in options.large:
        for kernels, lora, more in settings[: options.settings]:
            words = [sys.executable, str(HERE / "attention_probe.py"), shape, kernels, "--lora", lora, *more]
            # an inner device is the subprocess's own affair, and the pretended one has no such kernels
            words += [
                "--device",
                options.device if options.device != "far" else "cpu",
                "--against",
                default if kernels != default else "math",
            ]
            done = subprocess.run(
                words, capture_output=True, text=True, env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}, timeout=120, check=False
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            row = json.loads(lines[-1]) if lines else {"ok": False, "error": done.stderr[-600:]}
            # that cuDNN's kernel fails is a finding, not a fault of ours: the default leaves it out
            asked = "cudnn" in kernels
            yield {"case": f"{shape}, {kernels}, LoRA {lora}{' '.join(['', *more])}", **row, "ok": row["ok"] or asked, "right": row["ok"]}


class _StopAfter(Hook):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, loop: AlignmentLoop, report: Any) -> None:
        if report.step + 1 == self.steps:
            raise Interrupted("asked")


def resume(options: argparse.Namespace) -> Iterator[Row]:
    def loop(name: str, folder: Path, hooks: tuple[Hook, ...] = ()) -> AlignmentLoop:
        torch.manual_seed(0)
        if name == "TMPO":
            objective: Any = SoftmaxTB(embedded(options), rows=4, updates=2)
            sampler: TrajectorySampler = TreeSampler(6, FixedPlan((1, 2)))
        else:
            objective, sampler = SurrogateReward(TDMPolicy(embedded(options), steps=4), rows=8), DeterministicSampler(4, 4)
        more = {"prompts": PromptFile("shapeworld/count"), "prompts_per_step": 2, "aggregation": StandardizedSum(), "folder": folder}
        return AlignmentLoop(objective, sampler, CountReward(), hooks=[Checkpoints(folder, every=half), *hooks], **more)

    half = 1 if options.tiny else 2

    for name in ("TMPO", "TDM-R1")[: 1 if options.quick else 2]:
        with tempfile.TemporaryDirectory() as place:
            whole = loop(name, Path(place) / "whole")
            whole.run(2 * half)
            with suppress(Interrupted):
                loop(name, Path(place) / "parts", (_StopAfter(half),)).run(2 * half)
            again = loop(name, Path(place) / "parts")
            again.run(2 * half, again.hooks[0].restore(again))
        pairs = [
            (mine, its)
            for role, policy in whole.policies().items()
            for mine, its in zip(policy.own_parameters().values(), again.policies()[role].own_parameters().values(), strict=True)
        ]
        unequal = sum(not torch.equal(mine, its) for mine, its in pairs)
        yield {"case": name, "ok": unequal == 0, "tensors": len(pairs), "unequal": unequal}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "matrix": matrix,
    "contract": contract,
    "faults": faults,
    "resume": resume,
    "memory": memory,
    "demo": demo,
    "tf32": tf32,
    "together": together,
    "attention": attention,
}


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [part for part in PARTS if part != "together"]
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=usual, help="%(default)s")
    parser.add_argument("--device", default="cuda" if gpu else "far")
    parser.add_argument("--large", nargs="+", default=["flux", "sd3"] if gpu else ["tiny-flux", "tiny-sd3"], help="shapes of `attention`")
    parser.add_argument("--settings", type=int, default=2, help="of `attention`: the first so many of 6 (%(default)s)")
    parser.add_argument("--tiny", action="store_true", default=not gpu, help="a few grids and no large batches; always without a GPU")
    parser.add_argument("--every", type=int, default=1, help="every so many cases of the matrix")
    parser.add_argument("--quick", action="store_true", help="`contract` in float32 with two chains alone, `resume` of TMPO alone")
    parser.add_argument("--steps", type=int, default=10, help="of `demo`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else options.device}
    found: dict[str, Any] = {**about, "parts": {}}
    failed = 0
    with second_device() if options.device == "far" else nullcontext():
        for part in options.only:
            begun, rows = time.perf_counter(), []
            found["parts"][part] = {"rows": rows}
            try:
                for row in PARTS[part](options):
                    rows.append(row)
                    if not row["ok"]:
                        print("FAIL", part, json.dumps(row, default=str), flush=True)
                    _write(options.json, found)  # a machine may be taken away
            except Exception as error:  # the other parts are still worth their minutes
                rows.append({"case": "ended early", "ok": False, "error": f"{type(error).__name__}: {error}"[:2000]})
                print("FAIL", part, rows[-1]["error"], flush=True)
            wrong = sum(not row["ok"] for row in rows)
            failed += wrong
            found["parts"][part]["seconds"] = round(time.perf_counter() - begun, 1)
            print(f"{part:10s} {len(rows) - wrong:4d} of {len(rows):4d} hold, {found['parts'][part]['seconds']:6.1f} s", flush=True)
            _write(options.json, found)
    print(f"{about['device']}, torch {about['torch']}: {failed} failed")
    return 1 if failed else 0


def _write(file: Path | None, found: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
