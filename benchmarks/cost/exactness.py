"""What exactness costs: first-step contract, named draws on the CPU, and checks for finite numbers, as shares of a training step.

Runs TMPO on the embedded pipeline as the demo does, on a GPU where there is one. The contract repeats one call of the rollout at every step
after the first; noise is drawn on the CPU by name, so that a run is the same on every device; latents, losses and gradients are checked
before weights move. On an accelerator the device is waited for around each part, so a part's share holds what it starts there. Read the
shares, not the seconds. With --check-rows 0 there is no contract, with 8 at most eight rows of it.

Args:
    steps: after the two that warm up
    prompts: of a step
    check_rows: of the loop; none repeats whole calls
    device: of the policy; none takes a GPU if there is one
    json: also write the table here
"""

import pkgutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.cost.tree_steps import synchronize
from benchmarks.record import write
from diffalign import AlignmentLoop
from diffalign.core import Progress, ShiftedGrid, StandardizedSum
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import PromptFile
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.shapeworld import CountReward

PARTS = {
    "contract": ("diffalign.core.loop.check_first_step",),
    "draws": ("diffalign.core.streams.Streams.normals", "diffalign.core.streams.Streams.normal"),
    "finite": (
        "diffalign.core.rollout.require_finite",
        "diffalign.objectives.path_losses.require_finite",
        "diffalign.core.update._require_finite",
        "diffalign.core.update._require_finite_gradients",
    ),
}
"""Functions that a part is made of. What they call is theirs: a part inside another counts once."""


class Parts:
    """Adds up the seconds of each part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.inside = False

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            synchronize(self.device)
            self.inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.seconds[part] += time.perf_counter() - start
                self.inside = False

        return timed


def main(steps: int = 6, prompts: int = 10, check_rows: int | None = None, device: str | None = None, json: Path | None = None) -> None:
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(), grid=ShiftedGrid(2.0), max_sequence_length=16, device=place)
    source = PromptFile("shapeworld/count")
    loop = AlignmentLoop(
        objective=SoftmaxTB(policy),
        sampler=TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3))),
        rewards=CountReward(),
        prompts=source,
        aggregation=StandardizedSum(),
        prompts_per_step=prompts,
        check_rows=check_rows,
    )
    parts = Parts(policy.device)
    with ExitStack() as stack:
        for part, names in PARTS.items():
            for name in names:
                owner, _, attribute = name.rpartition(".")
                found = getattr(pkgutil.resolve_name(owner), attribute)
                stack.enter_context(mock.patch(name, parts.around(part, found)))
        for step in range(2):
            loop.step(source.draw(step, prompts), Progress(step, steps + 2))
        parts.seconds = dict.fromkeys(PARTS, 0.0)
        synchronize(policy.device)
        start = time.perf_counter()
        for step in range(2, steps + 2):
            loop.step(source.draw(step, prompts), Progress(step, steps + 2))
        synchronize(policy.device)
    whole = time.perf_counter() - start
    print(f"{policy.device}: {whole / steps:.3f} s a step")
    for part, seconds in parts.seconds.items():
        print(f"{part:9s} {seconds / whole:6.1%}  {1e3 * seconds / steps:7.1f} ms")
    shares = {part: seconds / whole for part, seconds in parts.seconds.items()}
    write(json, {"device": str(policy.device), "torch": torch.__version__, "seconds_a_step": whole / steps, "shares": shares})
