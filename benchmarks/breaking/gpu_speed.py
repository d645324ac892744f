"""What the GPU check asks of speed: compilation that ends, replayed calls, both with the same numbers, and budgets that fill the memory."""

import time
from collections.abc import Iterator

import attrs
import torch

from benchmarks.breaking.gpu_subjects import Options, Row, embedded
from benchmarks.cost.tree_steps import synchronize
from benchmarks.subjects.random_families import SD35_MEDIUM, TINY_SD35, Shape, condition_of, inputs_of, policy_of
from diffalign import AlignmentLoop
from diffalign.core import Hook, Report, StandardizedSum
from diffalign.costs.filling import Filling
from diffalign.objectives import SoftmaxTB
from diffalign.policies import CallGraphs, FlowMatchingPolicy
from diffalign.policies.compilation import Compilation
from diffalign.prompts import PromptFile
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.shapeworld import CountReward

WARM_UP = 60.0
"""Seconds that compilation may take for all calls of a run."""


def compiled(options: Options) -> Iterator[Row]:
    """Each kind of call of a TMPO run, first in a compiled network and then in the same one as it is."""
    if options.device == "far":
        yield {"case": "compile", "ok": True, "skipped": "the pretended device has no compiler"}
        return
    from torch._dynamo.utils import counters  # slow to import

    cuda = options.device.startswith("cuda")
    shape, dtype = (TINY_SD35, torch.float32) if options.tiny else (SD35_MEDIUM, torch.bfloat16)
    compilation = Compilation(backend="inductor" if cuda else "eager")
    policy, plain = (policy_of(shape, dtype, options.device, compilation=how) for how in (compilation, None))
    kinds = {"policy": policy, "frozen fork": policy.fork(), "fork to train": policy.fork(trainable=True)}
    kinds["fork without adapters"] = policy.fork(pristine=True)
    counters.clear()
    whole = time.perf_counter()
    for name, acting in kinds.items():
        for gradient in (False, True)[: 1 + (name in ("policy", "fork to train"))]:
            sizes = (3, 2, 6, 1) if gradient else (3, 9, 27, 1)
            before, start = counters["stats"]["unique_graphs"], time.perf_counter()
            found = [_called(acting, shape, rows, gradient)[0].float() for rows in sizes]
            seconds, start = time.perf_counter() - start, time.perf_counter()
            for rows in sizes:
                _called(acting, shape, rows, gradient)
            again, start = time.perf_counter() - start, time.perf_counter()
            expected = [_called(plain, shape, rows, gradient)[0].float() for rows in sizes]
            eager = time.perf_counter() - start
            gap = max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
            yield {
                "case": f"{name}{', with gradient' if gradient else ''}",
                "ok": gap < (2e-2 if dtype == torch.bfloat16 else 1e-3),
                "gap": gap,
                "graphs": counters["stats"]["unique_graphs"] - before,
                "first_s": round(seconds, 2),
                "again_s": round(again, 3),
                "eager_s": round(eager, 3),
            }
    seconds = time.perf_counter() - whole
    yield {"case": "all", "ok": seconds < WARM_UP or not cuda, "seconds": round(seconds, 1), "graphs": counters["stats"]["unique_graphs"]}


def replayed(options: Options) -> Iterator[Row]:
    """Calls and whole training runs with recorded calls and without: equal to the bit, and their seconds."""
    if not options.device.startswith("cuda"):
        yield {"case": "graphs", "ok": True, "skipped": "needs CUDA"}
        return
    for name, shape, dtype, sizes in (
        ("embedded", None, torch.float32, (16, 48, 144)),
        ("SD3.5-M", SD35_MEDIUM, torch.bfloat16, (1, 3, 9)),
        ("SD3.5-M, compiled", SD35_MEDIUM, torch.bfloat16, (1, 3, 9)),
    )[: 1 if options.tiny else 3]:
        compilation = Compilation() if "compiled" in name else None
        with_graphs, plain = (
            embedded(options, graphs=graphs)
            if shape is None
            else policy_of(shape, dtype, options.device, compilation=compilation, graphs=graphs)
            for graphs in (CallGraphs(gradients=True), None)
        )
        for rows in sizes:
            for gradient in (False, True):
                found, seconds = [], []
                for policy in (with_graphs, plain):
                    for seed in range(3):  # other inputs than those that were recorded
                        _called(policy, shape, rows, gradient, seed)
                    start = time.perf_counter()
                    found.append(_called(policy, shape, rows, gradient, 3))
                    seconds.append(round(1e3 * (time.perf_counter() - start), 2))
                mine, theirs = found
                gap = max(float((one - other).norm() / other.norm().clamp_min(1e-30)) for one, other in zip(mine, theirs, strict=True))
                case = f"{name}, {rows} rows{', with gradient' if gradient else ''}"
                limit = 2e-2 if gradient and dtype == torch.bfloat16 else 1e-6  # flash attention adds up gradients in any order
                yield {"case": case, "ok": gap < limit, "gap": gap, "ms": seconds[0], "plain_ms": seconds[1]}
        kept = {kind: with_graphs._recorded.count(on) for kind, on in (("without gradient", False), ("with gradient", True))}
        small = shape is None  # activations of the others are too large to be kept
        yield {"case": f"{name}, recorded", "ok": kept["without gradient"] > 0 and (kept["with gradient"] > 0 or not small), **kept}
        del with_graphs, plain
        torch.cuda.empty_cache()
    weights, steps, kept = [], [], {}
    for graphs in (CallGraphs(), CallGraphs(gradients=True), None):
        policy = embedded(options, graphs=graphs)
        loop = _tmpo(policy, (1, 2), 4 if options.tiny else 16)
        loop.advance(4)
        start = time.perf_counter()
        loop.advance(10, 4)
        synchronize(policy.device)
        steps.append(round((time.perf_counter() - start) / 6, 3))
        weights.append([tensor.detach().clone() for tensor in policy.trainable_parameters().values()])
        if graphs is not None:
            kept[graphs.gradients] = policy._recorded.count(graphs.gradients)
    for name, mine, step in zip(("", ", gradients too"), weights, steps, strict=False):
        unequal = sum(not torch.equal(one, other) for one, other in zip(mine, weights[-1], strict=True))
        recorded = kept[bool(name)]
        row = {"case": f"ten steps of TMPO{name}", "ok": unequal == 0 and recorded > 0, "unequal": unequal, "recorded": recorded}
        yield row | {"step_s": step, "plain_step_s": steps[-1]}


def _tmpo(policy: FlowMatchingPolicy, splits: tuple[int, ...], prompts: int) -> AlignmentLoop:
    return AlignmentLoop(
        SoftmaxTB(policy),
        TreeSampler(8, FixedPlan(splits)),
        CountReward(),
        PromptFile("shapeworld/count"),
        prompts_per_step=prompts,
        aggregation=StandardizedSum(),
    )


def _called(policy: FlowMatchingPolicy, shape: Shape | None, rows: int, gradient: bool, seed: int = 0) -> list[torch.Tensor]:
    """The velocity, and the gradients if they are on."""
    condition = policy.encode(["three red circles"]) if shape is None else condition_of(shape, policy)
    with torch.set_grad_enabled(gradient):
        velocity = policy.velocity(*inputs_of(policy, condition, rows, seed))
        if gradient:
            velocity.float().square().mean().backward()
    found = [velocity.detach(), *(tensor.grad for tensor in policy.trainable_parameters().values() if tensor.grad is not None)]
    policy.zero_grad(set_to_none=True)
    synchronize(policy.device)
    return found


@attrs.define(eq=False)
class _Budgets(Hook):
    found: list[Row] = attrs.field(factory=list)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        usage = {stage: usage.peak for stage, usage in report.ledger.usage.items()}
        foretold = {stage: report.ledger.predicted.get(stage) for stage in usage}
        seconds = sum(report.ledger.seconds.values())
        rows = {"sampler.rows": loop.sampler.rows, "objective.rows": loop.objective.rows, "chunk": loop.chunk}
        self.found.append({"seconds": round(seconds, 3), **rows, "peak": usage, "foretold": foretold})


def filled(options: Options) -> Iterator[Row]:
    """Budgets of six steps: they may grow, what was foretold is near what was seen, and memory does not run out."""
    if not options.device.startswith("cuda"):
        yield {"case": "filled", "ok": True, "skipped": "needs CUDA's allocator"}
        return
    noted = _Budgets()
    loop = _tmpo(embedded(options), (1, 2, 3), 4 if options.tiny else 32)
    loop.advance(6, also=(Filling(), noted))
    first, last = noted.found[0], noted.found[-1]
    for step, row in enumerate(noted.found):
        yield {"case": f"step {step}", "ok": True, **row}
    grown = last["sampler.rows"] >= first["sampler.rows"] and last["objective.rows"] >= first["objective.rows"]
    near = [seen / last["foretold"][stage] for stage, seen in last["peak"].items() if last["foretold"].get(stage)]
    yield {"case": "budgets", "ok": grown and all(0.5 < share < 1.5 for share in near), "seen_over_foretold": near}
