"""Milliseconds of network calls on a GPU: as they are, compiled, and their kernels alone, at the published shapes.

Random weights in bfloat16 with LoRA, as in `cost families`. For each number of rows a forward pass without gradient, the same replayed as a
CUDA graph (what the kernels take if the host starts them all at once; up to --replayed rows), then forward and backward passes. Prints
the median, how long the host was at work, the share of the peak, and writes JSON after each. Without a GPU, tiny networks, once.

Args:
    families: by their shapes
    rows: of forward passes
    both: rows of forward and backward passes
    replayed: most rows of a recorded call
    compiled: also blocks under torch.compile
    most: seconds after which nothing further begins
    repeats: of a call; the median counts
    json: also write the numbers here
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cost.families import GPU, H200, LARGE, TINY
from benchmarks.cost.tree_steps import synchronize
from benchmarks.record import write
from benchmarks.subjects.random_families import Counted, Shape, condition_of, counted, inputs_of, policy_of
from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.compilation import Compilation
from diffalign.policies.cuda_recorder import CudaRecorder

Call = Callable[[], torch.Tensor]


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median over the repeats of the whole call and of the host's part, after one call that warms up."""
    found: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        call()
        started = time.perf_counter()
        synchronize(device)
        found.append((1e3 * (time.perf_counter() - begin), 1e3 * (started - begin)))
    return {name: round(statistics.median(each), 2) for name, each in zip(("ms", "host_ms"), zip(*found[1:], strict=True), strict=True)}


def velocity_of(policy: FlowMatchingPolicy, shape: Shape, rows: int) -> Call:
    return functools.partial(policy.velocity, *inputs_of(policy, condition_of(shape, policy), rows))


def both_passes(policy: FlowMatchingPolicy, call: Call) -> None:
    call().float().square().mean().backward()
    policy.zero_grad(set_to_none=True)


def replayed(call: Call, repeats: int, device: torch.device) -> dict[str, Any]:
    recorder, expected = CudaRecorder(), call()
    recorder.warm(call)
    output, replay = recorder.record(call, recorder.pool())
    found = milliseconds(replay, device, repeats)
    return {"ms": found["ms"], "equal": bool(torch.equal(output, expected))}


def of(
    policy: FlowMatchingPolicy, shape: Shape, model: Counted, rows: Sequence[int], both: Sequence[int], most: int, repeats: int
) -> Iterator[tuple[str, Callable[[], dict[str, Any]], float]]:
    """Name, measurement, and useful operations of each call."""
    for count in rows:
        call = torch.no_grad()(velocity_of(policy, shape, count))
        yield f"forward, {count} rows", lambda call=call: milliseconds(call, policy.device, repeats), count * model.forward
        if count <= most and GPU:
            yield f"forward, {count} rows, replayed", lambda call=call: replayed(call, repeats, policy.device), count * model.forward
    for count in both:
        step = functools.partial(both_passes, policy, velocity_of(policy, shape, count))
        useful = count * (model.forward + model.backward)
        yield f"both, {count} rows", lambda step=step: milliseconds(step, policy.device, repeats), useful


def main(
    families: tuple[Literal[*LARGE], ...] = tuple(LARGE),
    rows: tuple[int, ...] = (1, 3, 9, 27, 108) if GPU else (1, 3),
    both: tuple[int, ...] = (2, 6, 13) if GPU else (2,),
    replayed: int = 9,
    compiled: bool = True,
    most: float = 300.0,
    repeats: int = 3 if GPU else 1,
    json: Path | None = None,
) -> None:
    end = time.monotonic() + most
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__, "calls": {}}
    for family in families:
        shape = (LARGE if GPU else TINY)[family]
        model = counted(shape)
        for way in ("as it is", "compiled")[: 1 + compiled]:
            compilation = Compilation(backend="inductor" if GPU else "eager") if way == "compiled" else None
            policy = policy_of(shape, torch.bfloat16 if GPU else torch.float32, "cuda" if GPU else "cpu", compilation=compilation)
            for name, measure, useful in of(policy, shape, model, rows, both, replayed, repeats):
                if time.monotonic() > end:
                    continue
                begin = time.monotonic()
                try:
                    row = measure()
                except torch.OutOfMemoryError:
                    row = {"error": "out of memory"}
                    torch.cuda.empty_cache()
                else:
                    row |= {"share": round(useful / row["ms"] / H200 / 1e9, 3)} if GPU else {}
                row["seconds"] = round(time.monotonic() - begin, 1)  # with compilation, where it is the first of its kind
                found["calls"][f"{shape.name}, {way}, {name}"] = row
                print(f"{shape.name}, {way}, {name}: {row}", flush=True)
                write(json, found)
            del policy
