"""What crosses between host and device in one step of TMPO and of TDM-R1, counted on the pretended device.

The embedded pipeline, two prompts: a tree of 27 trajectories in 6 steps with an update in pieces of 4 rows (SoftmaxTB), and a student of 4
steps with 6 samples (SurrogateReward); the second step of a run, so that nothing is loaded or encoded for the first time. A wait is a place
where the host stands still until the device has caught up: `.item()`, `bool(tensor)`, a mask, a copy down, a copy up that is not
`non_blocking`, an index on the CPU. Counts are exact and do not depend on the machine.

Args:
    places: that are printed, the busiest first
    json: also write the table here
"""

from pathlib import Path

import torch

from benchmarks.record import write
from diffalign import AlignmentLoop
from diffalign.core import Objective, ShiftedGrid, StandardizedSum, TrajectorySampler
from diffalign.objectives import SoftmaxTB, SurrogateReward
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler
from diffalign.shapeworld import CountReward
from diffalign.testing import second_device
from diffalign.testing.pretended_device import Traffic

TREE = TreeSampler(6, FixedPlan((1, 2, 3)))


def policy() -> FlowMatchingPolicy:
    return FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=4), grid=ShiftedGrid(2.0), max_sequence_length=16, device="far")


def counted(objective: Objective, sampler: TrajectorySampler) -> Traffic:
    prompts = Prompts(["three red circles", "two blue squares"])
    loop = AlignmentLoop(objective, sampler, CountReward(), prompts, prompts_per_step=2, aggregation=StandardizedSum())
    loop.advance(1)
    with second_device() as traffic:
        loop.advance(2, start=1)
    return traffic


def table(tree: TreeSampler = TREE, samples: int = 6) -> dict[str, dict[str, object]]:
    """What each run moves and where it waits.

    Args:
        tree: of TMPO
        samples: of TDM-R1, per prompt
    """
    torch.manual_seed(0)
    with second_device():
        found = {
            "TMPO": counted(SoftmaxTB(policy(), rows=4), tree),
            "TDM-R1": counted(SurrogateReward(TDMPolicy(policy(), steps=4)), DeterministicSampler(4, samples)),
        }
    return {
        name: {
            "waits": traffic.synchronizations,
            "bytes up": traffic.bytes_up,
            "bytes down": traffic.bytes_down,
            "copies": traffic.copies,
            "places": dict(traffic.waits.most_common()),
        }
        for name, traffic in found.items()
    }


def main(places: int = 12, json: Path | None = None) -> None:
    found = table()
    for name, row in found.items():
        print(f"{name:8s} {row['waits']} waits, {row['bytes up']:,} bytes up, {row['bytes down']:,} down, {row['copies']} copies")
        for place, times in list(row["places"].items())[:places]:
            print(f"  {times:4d}  {place}")
    write(json, found)
