"""What one step of TDM-R1 costs: network rows by role, and what each role keeps in memory.

Runs the released form (one phase, three roles) on the embedded pipeline. Rows and bytes are exact counts; a guided evaluation is two rows.

Args:
    prompts: of the step
    samples: of a prompt
    guidance: of the teacher and of the surrogate; 1 is none
    json: also write the table here
"""

from pathlib import Path

from benchmarks.record import write
from diffalign import AlignmentLoop
from diffalign.core import Policy, Progress, ShiftedGrid
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


def main(prompts: int = 2, samples: int = 4, guidance: float = 3.0, json: Path | None = None) -> None:
    base = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=32), max_sequence_length=16)
    objective = SurrogateReward(
        TDMPolicy(base, steps=4, grid=ShiftedGrid(3.0)),
        guidance=guidance,
        reward_guidance=guidance,
        stages=UniformStages(2),
        surrogate_stages=CleanerStages(2),
    )
    source = PromptFile("shapeworld/count")
    sampler = DeterministicSampler(steps=4, samples=samples)
    loop = AlignmentLoop(objective, sampler, CountReward(), source, prompts_per_step=prompts)
    report = loop.step(source.draw(0, prompts), Progress(0, 1))
    count = prompts * samples
    rows, memory = dict(report.ledger.rows), bytes_of(dict(objective.policies()))
    print(f"{count} samples, 2 stages of 4\n{'network rows':<36}{'in all':>10}{'per sample':>12}")
    for entry, number in rows.items():
        print(f"{entry:<36}{number:>10}{number / count:>12.1f}")
    print(f"\n{'tensors of':<36}{'MB':>10}")
    for role, size in memory.items():
        print(f"{role:<36}{size / 1e6:>10.3f}")
    write(json, {"samples": count, "rows": rows, "bytes": memory})
