"""What a step gains when a slow remote reward scores one prompt while the next is rolled out.

TMPO on the embedded pipeline, with a reward server in a process of its own that sleeps before it answers. The same run three times: all
prompts sampled and then scored; prompt by prompt, one after the other; prompt by prompt, scored beside the next rollout. "scored samples"
is the time of a step up to the update: rollout, decoding, and waiting for scores; "waited" is the last of them, "hidden" what the reward
took beside. The last column is the largest difference of a reward of the first step from the run before; 0 is bit for bit. Read the third
against the second: the first sends fewer, larger requests.

Args:
    sleep: seconds that the server takes for a request
    steps: after the one that warms up
    prompts: of a step
    json: also write the table here
"""

from pathlib import Path

import torch

from benchmarks.cost.reward_process import served
from benchmarks.record import write
from diffalign import AlignmentLoop
from diffalign.core import Hook, Overlapped, Rollout, Sequential, ShiftedGrid, StandardizedSum
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import PromptFile
from diffalign.rewards import RemoteReward
from diffalign.samplers import FixedPlan, TreeSampler

REWARD = """
import time

def slow(images, prompts):
    time.sleep({sleep})
    return images[:, 0].mean(dim=(1, 2))
"""


class Watch(Hook):
    """Keeps the rewards of the first step, which warms up, and the time of the others."""

    def __init__(self) -> None:
        self.rewards, self.scored, self.waited, self.hidden = None, 0.0, 0.0, 0.0

    def step(self, loop, report) -> None:
        if report.step == 0:
            self.rewards = report.batch.parts["RemoteReward"]
            return
        seconds = report.ledger.seconds
        self.scored += seconds["rollout"] + seconds["decode"] + seconds["reward"]
        self.waited += seconds["reward"]
        self.hidden += report.ledger.hidden.get("reward", 0.0)


def measured(rollout: Rollout, url: str, steps: int, prompts: int) -> Watch:
    torch.manual_seed(0)
    hook = Watch()
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(), grid=ShiftedGrid(2.0), max_sequence_length=16)
    loop = AlignmentLoop(
        objective=SoftmaxTB(policy),
        sampler=TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2))),
        rewards=RemoteReward(url, batch=32),
        prompts=PromptFile("shapeworld/count"),
        aggregation=StandardizedSum(),
        prompts_per_step=prompts,
        rollout=rollout,
        hooks=[hook],
    )
    loop.run(steps + 1)
    return hook


def main(sleep: float = 0.5, steps: int = 2, prompts: int = 4, json: Path | None = None) -> None:
    rollouts = {"Sequential()": Sequential(), "Sequential(1)": Sequential(1), "Overlapped(1)": Overlapped(1)}
    with served(REWARD.format(sleep=sleep), "slow") as (url, _, _):
        found = {name: measured(rollout, url, steps, prompts) for name, rollout in rollouts.items()}
    print(f"{'rollout':<16}{'scored samples, ms':>20}{'waited':>10}{'hidden':>10}{'difference':>14}")
    table, before = {}, None
    for name, hook in found.items():
        scored, waited, hidden = (1000 * seconds / steps for seconds in (hook.scored, hook.waited, hook.hidden))
        apart = 0.0 if before is None else float((hook.rewards - before).abs().max())
        print(f"{name:<16}{scored:>20.0f}{waited:>10.0f}{hidden:>10.0f}{apart:>14.2g}")
        table[name], before = {"scored samples": scored, "waited": waited, "hidden": hidden, "difference": apart}, hook.rewards
    write(json, {"sleep": sleep, "steps": steps, "prompts": prompts, "milliseconds": table})
