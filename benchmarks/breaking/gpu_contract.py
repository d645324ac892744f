"""What the GPU check asks of the first-step contract: a true replay is never refused, a false one always."""

from collections.abc import Iterator

import torch

from benchmarks.breaking.gpu_subjects import Options, Row, embedded, forest_of
from benchmarks.subjects.random_families import TINY_FLUX, TINY_SD35, condition_of, policy_of
from diffalign.core import CPS, UNRECORDED, ContractError, FlowSDE, Guided, Policy, Progress, Streams, check_first_step
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing.broken import FAULTS, BrokenReplay


def contract(options: Options) -> Iterator[Row]:
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
                            numbers = {"deviation": found.deviation, "rounding": found.rounding, "part": part.deviation}
                            yield {"case": where, "ok": True, **numbers}

    for shape in (TINY_FLUX, TINY_SD35):  # the grids of their schedulers
        for dtype in ("float32", "bfloat16")[: 1 if options.quick else 2]:
            policy = policy_of(shape, getattr(torch, dtype), options.device)
            with torch.no_grad():
                sampler = ChainSampler(4 if options.tiny else 28, 3)
                forest = sampler.sample(policy, condition_of(shape, policy), Progress(0, 1), Streams(3))
            found, part = check_first_step(policy, forest), check_first_step(policy, forest, step=1, rows=2)
            numbers = {"deviation": found.deviation, "rounding": found.rounding, "part": part.deviation}
            yield {"case": f"{dtype}, {shape.name}, its own grid", "ok": True, **numbers}


def faults(options: Options) -> Iterator[Row]:
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
