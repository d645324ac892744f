"""What one step of TDM-R1 costs: network rows by role, and what each role keeps in memory.

python benchmarks/tdm_r1_step.py [--prompts 2] [--samples 4] [--guidance 3.0] [--json FILE]

Runs the released form (one phase, three roles) on the embedded pipeline. Rows and bytes are exact counts; a guided evaluation is two rows.
"""

import argparse
import json
from pathlib import Path

from diffalign import AlignmentLoop, Policy, Progress
from diffalign.core import ShiftedGrid
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import CleanerStages, UniformStages
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.prompts import PromptFile
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import CountReward


def bytes_of(policies: dict[str, Policy]) -> dict[str, int]:
    """Bytes of the tensors that only one role has, by role, and of those that all share; every tensor once."""
    owners: dict[int, set[str]] = {}
    sizes: dict[int, int] = {}
    for role, policy in policies.items():
        for parameter in policy.parameters():
            owners.setdefault(id(parameter), set()).add(role)
            sizes[id(parameter)] = parameter.numel() * parameter.element_size()
    shared = sum(size for key, size in sizes.items() if len(owners[key]) == len(policies))
    own = {role: sum(size for key, size in sizes.items() if owners[key] == {role}) for role in policies}
    assert shared + sum(own.values()) == sum(sizes.values()), "some tensor belongs to several roles, but not to all"
    return {"frozen backbone, shared by all": shared, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher and of the surrogate; 1 is none")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()

    base = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=32), max_sequence_length=16)
    objective = SurrogateReward(
        TDMPolicy(base, steps=4, grid=ShiftedGrid(3.0)),
        guidance=arguments.guidance,
        reward_guidance=arguments.guidance,
        stages=UniformStages(2),
        surrogate_stages=CleanerStages(2),
    )
    prompts = PromptFile("shapeworld/count")
    sampler = DeterministicSampler(steps=4, samples=arguments.samples)
    loop = AlignmentLoop(objective, sampler, CountReward(), prompts, prompts_per_step=arguments.prompts)
    report = loop.step(prompts.draw(0, arguments.prompts), Progress(0, 1))
    count = arguments.prompts * arguments.samples
    rows, memory = dict(report.ledger.rows), bytes_of(dict(objective.policies()))
    print(f"{count} samples, 2 stages of 4\n{'network rows':<36}{'in all':>10}{'per sample':>12}")
    for entry, number in rows.items():
        print(f"{entry:<36}{number:>10}{number / count:>12.1f}")
    print(f"\n{'tensors of':<36}{'MB':>10}")
    for role, size in memory.items():
        print(f"{role:<36}{size / 1e6:>10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"samples": count, "rows": rows, "bytes": memory}, indent=1))


if __name__ == "__main__":
    main()
