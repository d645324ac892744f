"""One TMPO step of real model sizes: seconds, network rows/s, share of the device's peak, memory, and how exactly a replay repeats.

Random weights of the published shapes (FLUX.1-dev, Stable Diffusion 3.5 Medium; nothing is downloaded, no text encoder and no autoencoder)
in bfloat16 with LoRA, 512 x 512; a prompt group is a tree of 27 leaves (3 x 3 x 3), and --prompts says how many groups a step has. Without
a GPU, and with --tiny, small networks of the same families in float32, whose seconds say nothing about the large ones. The ways of doing
the same step:
  diffalign                 TreeSampler and SoftmaxTB, the update in pieces of --rows network rows
  filled                    the same with as many rows at once as the memory holds: all, then half as many until they fit
  filled, compile           that under torch.compile, block by block; warm_up_s says what the first step took
  filled, compile, graphs   and calls that wait for the host recorded and replayed (CallGraphs)
  checkpointing             the same with recomputed activations, the update in one piece
  compile                   `diffalign` under torch.compile, block by block
  checkpointing, compile    both
  release                   every branch alone (batch 1), and in the update every stochastic step of every leaf (dense); checkpointing

The share of the peak counts useful operations: of the rows that carry a gradient a forward and a backward pass, as torch's counter finds
them on the meta device. Rows that are evaluated without gradient to weigh pieces, and recomputed activations, take time and count nothing.
Deviation is what the first-step contract looks at: |mean - rollout mean| / std, at all branching nodes. A way that does not fit the memory
is reported as such. Memory is the most that a GPU's allocator has given out; without a GPU, the live tensors that rollout and update made,
weights not counted.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import attrs
import torch

from benchmarks.cost.tree_steps import SUB_BATCH, Rollout, Update, branch_by_branch, measured, ours
from benchmarks.record import Record
from benchmarks.subjects.random_families import (
    FLUX_DEV,
    SD35_MEDIUM,
    TINY_FLUX,
    TINY_SD35,
    Counted,
    Shape,
    condition_of,
    counted,
    policy_of,
)
from diffalign.core import Progress, Streams
from diffalign.core.contract import check_first_step
from diffalign.costs.live import LiveBytes
from diffalign.policies import CallGraphs, FlowMatchingPolicy
from diffalign.policies.compilation import Compilation
from diffalign.samplers import FixedPlan, TreeSampler

SCHEDULES = {
    FLUX_DEV: (6, FixedPlan((1, 2, 3))),
    SD35_MEDIUM: (28, FixedPlan((7, 14, 21))),
    TINY_FLUX: (6, FixedPlan((1, 2, 3))),
    TINY_SD35: (8, FixedPlan((2, 4, 6))),
}
LARGE, TINY = {"flux": FLUX_DEV, "sd3": SD35_MEDIUM}, {"flux": TINY_FLUX, "sd3": TINY_SD35}

H200 = 989.4
"""Its peak in bfloat16 without sparsity, TFLOP/s, as the maker gives it."""


@attrs.frozen
class Way:
    """How a step is done.

    Args:
        name: printed
        checkpointing, compiled: of the network
        whole: the update in one piece, instead of pieces of --rows
        dense: in the order of the release
        filled: as many rows at once as fit
        graphs: calls that wait for the host are recorded and replayed
    """

    name: str
    checkpointing: bool = False
    compiled: bool = False
    whole: bool = False
    dense: bool = False
    filled: bool = False
    graphs: bool = False


WAYS = (
    Way("diffalign"),
    Way("filled", filled=True),
    Way("filled, compile", filled=True, compiled=True),
    Way("filled, compile, graphs", filled=True, compiled=True, graphs=True),
    Way("checkpointing", checkpointing=True, whole=True),
    Way("compile", compiled=True),
    Way("checkpointing, compile", checkpointing=True, compiled=True, whole=True),
    Way("release", checkpointing=True, dense=True),
)


GPU = torch.cuda.is_available()


@attrs.frozen
class Options:
    """What is measured.

    Args:
        tiny: small networks; always where there is no GPU
        families: by their shapes
        ways: of doing a step
        prompts: prompt groups of a step
        most: seconds after which nothing further begins
        device: of the networks
        dtype: of the weights; null is bfloat16, and float32 for tiny networks
        first: rows at once with which `filled` begins; null is all
        rows: network rows a piece of the update
        rollout_rows: network rows a call of the rollout
        sub_batch: leaves a call of the release's update
        repeats: steps after the one that warms up
        peak: TFLOP/s of the device; by default that of an H200 on a GPU
        backend: of torch.compile
        json: also write the table here, after each way; what it has from an equal call is not measured again
    """

    tiny: bool = not GPU
    families: tuple[Literal[*LARGE], ...] = tuple(LARGE)
    ways: tuple[Literal[*(way.name for way in WAYS)], ...] = tuple(way.name for way in WAYS)
    prompts: tuple[int, ...] = (1, 4, 8) if GPU else (1,)
    most: float = 300.0
    device: str = "cuda" if GPU else "cpu"
    dtype: Literal["bfloat16", "float32"] | None = None
    first: int | None = None
    rows: int = 2
    rollout_rows: int = 27
    sub_batch: int = SUB_BATCH
    repeats: int = 3
    peak: float | None = H200 if GPU else None
    backend: str = "inductor" if GPU else "eager"
    json: Path | None = None

    def number(self) -> str:
        """The type of the weights."""
        return self.dtype or ("float32" if self.tiny else "bfloat16")


@attrs.define
class GradientRows:
    """Counts the network rows that carry a gradient; recomputation happens inside the network and is not seen."""

    rows: int = 0

    def watch(self, network: torch.nn.Module) -> None:
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        self.rows += len(keywords["hidden_states"]) if torch.is_grad_enabled() else 0


def step_of(
    way: Way, shape: Shape, policy: FlowMatchingPolicy, options: Options, prompts: int, budget: int | None
) -> tuple[Rollout, Update]:
    one, (steps, plan) = condition_of(shape, policy), SCHEDULES[shape]
    several = attrs.evolve(one.select(torch.zeros(prompts, dtype=torch.long)), ids=torch.arange(prompts))
    if way.dense:
        return branch_by_branch(policy, several, plan.draw(steps, Progress(0, 1), Streams(0)), options.sub_batch)
    rollout_rows = budget if way.filled else options.rollout_rows
    rows = budget if way.filled else None if way.whole else options.rows
    return ours(policy, several, TreeSampler(steps, plan, rows=rollout_rows), rows=rows)


def fitting(way: Way, shape: Shape, model: Counted, options: Options, prompts: int) -> dict[str, float | None]:
    """The numbers of one way, with half the rows at once as long as they do not fit, where it is to fill the memory."""
    budget = options.first if way.filled else None
    while True:
        try:
            return measure(way, shape, model, options, prompts, budget)
        except torch.OutOfMemoryError:
            budget = 27 * prompts // 2 if budget is None else budget // 2
            if not way.filled or budget < 1:
                return {}
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    way: Way, shape: Shape, model: Counted, options: Options, prompts: int = 1, budget: int | None = None
) -> dict[str, float | None]:
    """The numbers of one way; the first step warms up, and compiles."""
    compilation = Compilation(backend=options.backend) if way.compiled else None
    policy = policy_of(
        shape, getattr(torch, options.number()), options.device, way.checkpointing, compilation, CallGraphs() if way.graphs else None
    )
    gradient = GradientRows()
    gradient.watch(policy.network)
    rollout, update = step_of(way, shape, policy, options, prompts, budget)
    runs: list[dict[str, float]] = []
    on_gpu = policy.device.type == "cuda"
    for turn in range(options.repeats + 1):
        gradient.rows = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(policy.device)
        run = measured(policy, rollout, update)
        if turn:
            runs.append(run | {"gradient_rows": gradient.rows})
        else:
            warm_up = run["rollout_s"] + run["update_s"]
    result: dict[str, float | None] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result |= {"warm_up_s": warm_up, "rows_at_once": budget}
    useful = {"rollout": result["rollout_rows"] * model.forward, "update": result["gradient_rows"] * (model.forward + model.backward)}
    seconds = {part: result[f"{part}_s"] for part in useful}
    for part in useful:
        result[f"{part}_rows_per_s"] = result[f"{part}_rows"] / seconds[part]
        result[f"{part}_mfu"] = None if options.peak is None else useful[part] / seconds[part] / (options.peak * 1e12)
    batch = rollout()
    first = check_first_step(policy, batch.trajectories)  # raises where a replay is not the rollout
    result["deviation"], result["rounding"] = first.deviation, first.rounding
    result["peak_bytes"] = torch.cuda.max_memory_allocated(policy.device) if on_gpu else None
    if not on_gpu and not way.compiled:  # a compiled graph is not seen by the counter of tensors
        with LiveBytes() as live:
            update(rollout())
        result["peak_bytes"] = live.peak
    return result


def called(way: Way, prompts: int) -> str:
    return way.name if prompts == 1 else f"{way.name}, {prompts} prompts"


def ways_of(shape: Shape, model: Counted, options: Options, table: dict[str, dict[str, float | None]], end: float) -> Iterator[str]:
    """Measure what the table lacks, one after the other, until the time is over."""
    for prompts in options.prompts:
        for way in WAYS:
            name = called(way, prompts)
            if way.name not in options.ways or name in table or (table and time.monotonic() > end):
                continue
            table[name] = fitting(way, shape, model, options, prompts)
            yield name
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            torch.compiler.reset()


def line(name: str, row: dict[str, float | None]) -> str:
    if not row:
        return f"{'  ' + name:26s} does not fit the memory"
    share = ["   -" if row[f"{part}_mfu"] is None else f"{row[f'{part}_mfu']:4.0%}" for part in ("rollout", "update")]
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.3f}"
    parts = (
        f"{row[f'{part}_rows']:5.0f} {row[f'{part}_s']:8.3f} {row[f'{part}_rows_per_s']:8.1f} {mfu}"
        for part, mfu in zip(("rollout", "update"), share, strict=True)
    )
    return f"{'  ' + name:26s} {' '.join(parts)} {peak:>9s} {row['deviation']:10.2e} {row['rounding']:10.2e}"


def main(options: Options) -> None:
    name = torch.cuda.get_device_name() if GPU else "CPU, 1 thread"
    made = attrs.asdict(
        attrs.evolve(options, dtype=options.number()),
        filter=lambda field, _: field.name not in ("json", "families", "ways", "prompts", "most"),
    )
    end = time.monotonic() + options.most
    record = Record(options.json, {"device": name, "torch": torch.__version__, "options": made})
    print(f"{name}, torch {torch.__version__}, {options.number()}")
    columns = (
        f"{'rollout: rows, s, rows/s, peak':>28s} {'update: rows, s, rows/s, peak':>28s} {'GiB':>9s} {'deviation':>10s} {'rounding':>10s}"
    )
    print(f"{'':26s} {columns}")
    for family in options.families:
        shape = (TINY if options.tiny else LARGE)[family]
        model = counted(shape)
        steps, plan = SCHEDULES[shape]
        print(f"{shape.name}, T={steps} {list(plan.splits)}: {model.weights / 1e9:.3f} G weights, {model.forward / 1e12:.4g} TFLOP a row")
        about = {"model": attrs.asdict(model), "steps": steps, "splits": list(plan.splits)}
        found = record.content.setdefault("families", {}).setdefault(shape.name, {**about, "ways": {}})
        for name in ways_of(shape, model, options, found["ways"], end):
            print(line(name, found["ways"][name]), flush=True)
            record.save()  # a later way may end the process
