"""Small runs of every objective, sampler, plan, kernel, rollout and wrapper, which end on any device where they end on the CPU.

Shared by the tests, which walk it on the pretended device, and by the GPU check, which walks it on a real one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diffalign import AlignmentLoop
from diffalign.core import (
    CPS,
    Average,
    Euler,
    FlowSDE,
    Guided,
    Objective,
    Overlapped,
    Policy,
    RunningScale,
    Sequential,
    StandardizedParts,
    StandardizedSum,
    TrajectorySampler,
)
from diffalign.objectives import (
    AWM,
    CRD,
    DGPO,
    ELBO,
    RAM,
    DiffusionNFT,
    DirectReinforcement,
    ELBOGroupForwardKL,
    ELBOPolicyGradient,
    ELBOSoftmaxTB,
    FlowGRPO,
    GroupForwardKL,
    KLBudget,
    KLMask,
    NormGuarded,
    OnPolicyDistillation,
    SoftmaxTB,
    SurrogateReward,
    TrajectoryDistributionMatching,
)
from diffalign.objectives import few_step as fs
from diffalign.policies import GaussianMixturePolicy, NetworkPolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import AdaptivePlan, ChainSampler, DeterministicSampler, DrawnSteps, FixedPlan, Heun, ProgressPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

TEXTS = ["a red cube", "two blue stars", "three green disks"]
TREE = TreeSampler(5, FixedPlan((1, 2), branches=3))
ROOTED = TreeSampler(6, FixedPlan((2, 4), branches=2, roots=3))
CHAIN = ChainSampler(5, samples=3)
FEW = DeterministicSampler(4, samples=4)
MANY = DeterministicSampler(8, samples=3)

Parts = tuple[Objective, TrajectorySampler]
Build = Callable[[str, torch.dtype], Parts]
"""(device, type of number) -> what a run is made of."""


@attrs.frozen(eq=False)
class Case:
    """A small run.

    Args:
        build: its objective and its sampler
        options: further arguments of the loop, made anew for each run
    """

    build: Build
    options: Callable[[], Mapping[str, Any]] = dict


def tiny(device: str, dtype: torch.dtype, **options: Any) -> TinyPolicy:
    return TinyPolicy((4, 2, 2), dtype=dtype, **options).to(device)


def student(device: str, dtype: torch.dtype, **options: Any) -> TDMPolicy:
    return TDMPolicy(tiny(device, dtype), steps=4, **options)


def after(case: Case, device: str, dtype: torch.dtype, steps: int = 2) -> dict[str, Tensor]:
    """The weights of every policy after some steps, on the CPU, by role and name.

    Raises:
        ValueError: a policy is not on one device, or the trained weights have not moved.
    """
    objective, sampler = case.build(device, dtype)
    # not AdamW: its epsilon is 0 in float16, and it divides rounding by rounding
    options = {
        "optimizers": {"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        "rewards": channel_reward,
        **case.options(),
    }
    loop = AlignmentLoop(objective=objective, sampler=sampler, prompts=Prompts(TEXTS), prompts_per_step=2, **options)
    before = [parameter.detach().clone() for parameter in objective.policy.trainable_parameters().values()]
    loop.run(steps)
    for role, policy in loop.policies().items():
        if (found := {parameter.device for parameter in policy.parameters()}) != {objective.policy.device}:
            raise ValueError(f"{role}: its weights must all be on {objective.policy.device}; they are on {found}")
    moved = zip(objective.policy.trainable_parameters().items(), before, strict=True)
    if still := [name for (name, now), then in moved if torch.equal(now, then)]:
        raise ValueError(f"the trained weights must have moved; {still[0]!r} has not")
    return {f"{role}.{name}": p.detach().cpu() for role, policy in loop.policies().items() for name, p in policy.own_parameters().items()}


def gap(case: Case, device: str, dtype: torch.dtype) -> float:
    """Largest difference of a weight between a run on the device and one on the CPU, relative to the largest weight."""
    there, here = (after(case, where, dtype) for where in (device, "cpu"))
    if there.keys() != here.keys():
        raise ValueError(f"both runs must have the same weights; {sorted(there.keys() ^ here.keys())[0]!r} is in one alone")
    largest = max(float(weights.abs().max()) for weights in here.values())
    return max(float((there[name] - weights).abs().max()) for name, weights in here.items()) / largest


def _few(
    objective: Callable[..., Objective], **options: Any
) -> tuple[Callable[[str, torch.dtype, int | None], Objective], TrajectorySampler]:
    return lambda device, dtype, rows: objective(student(device, dtype), rows=rows, **options), FEW


def _paths(
    objective: Callable[..., Objective], sampler: TrajectorySampler = TREE, density: str = "mean", **options: Any
) -> tuple[Callable[[str, torch.dtype, int | None], Objective], TrajectorySampler]:
    return lambda device, dtype, rows: objective(tiny(device, dtype, kernel=CPS(density)), rows=rows, **options), sampler


def _taught(policy: Policy, rows: int | None) -> OnPolicyDistillation:
    teacher = policy.fork(trainable=True)
    with torch.no_grad():
        for parameter in teacher.trainable_parameters().values():
            parameter.add_(0.1)
    return OnPolicyDistillation(policy, {"one": teacher.fork()}, rows=rows)


_OBJECTIVES = {
    "SoftmaxTB": _paths(SoftmaxTB),
    "SoftmaxTB, three updates": _paths(SoftmaxTB, updates=3, reference_weight=0.1),
    "SoftmaxTB, squared": _paths(SoftmaxTB, loss="squared", level_weights=True),
    "SoftmaxTB, roots": _paths(SoftmaxTB, ROOTED, center="root", level_weights=True),
    "SoftmaxTB, budget": _paths(SoftmaxTB, beta=KLBudget(0.5)),
    "SoftmaxTB, path": _paths(SoftmaxTB, CHAIN, measure="path", center="none"),
    "SoftmaxTB, release": _paths(SoftmaxTB.release_compatible, density="squared", updates=2, reference_weight=0.1),
    "GroupForwardKL": _paths(GroupForwardKL, reference_weight=0.1),
    "FlowGRPO": _paths(FlowGRPO, CHAIN, updates=2),
    "FlowGRPO, in the reward": _paths(FlowGRPO, kl_in="reward", ratio_norm=True, level_weights=True),
    "DiffusionNFT": _paths(DiffusionNFT, FEW, kl=0.1),
    "DGPO": _paths(DGPO, MANY, updates=2),
    "DGPO, softplus": _paths(DGPO, MANY, loss="softplus", clip=None),
    "DGPO, rolled out by its average": _paths(DGPO, MANY, rollouts="old", decay=0.3),
    "DGPO, ends of a solver": _paths(DGPO, attrs.evolve(MANY, solver=Heun())),
    "FlowGRPO, mask": _paths(FlowGRPO, CHAIN, updates=2, kl_mask=KLMask(1e-6)),
    "AWM": _paths(AWM, FEW, updates=2, mask=KLMask(1e-6)),
    "CRD": _paths(CRD, FEW, decay=0.5),
    "RAM": _paths(RAM, FEW),
    "ELBOSoftmaxTB": _paths(ELBOSoftmaxTB, FEW, updates=2),
    "ELBOGroupForwardKL": _paths(ELBOGroupForwardKL, FEW, bound=ELBO(shared=False, stratified=False)),
    "ELBOPolicyGradient": _paths(ELBOPolicyGradient, FEW, updates=2),
    "SoftmaxTB, guarded": _paths(lambda policy, rows: NormGuarded(SoftmaxTB(policy, rows=rows), rows=rows)),
    "On-policy distillation": _paths(_taught, FEW),
    "TDM": _few(TrajectoryDistributionMatching),
    "TDM, guided": _few(TrajectoryDistributionMatching, guidance=2.0),
    "TDM-R1": _few(SurrogateReward),
    "TDM-R1, guided": _few(SurrogateReward, guidance=2.0, reward_guidance=2.0),
    "TDM-R1, student score": _few(
        SurrogateReward, reference=fs.StudentScore(), baseline=fs.StudentScore(), group_objective=fs.RewardWeighted()
    ),
    "TDM-R1, in order": _few(SurrogateReward, reference=fs.MovingReference(), plan=fs.InOrder(), reward_stages=2, shared="sample"),
    "TDM-R1, by prompt": _few(
        SurrogateReward,
        stages=fs.UniformStages(2),
        stages_by="prompt",
        shared="sample",
        reward_noise="sample",
        reward_weights=(1.0, 1.0, 0.5, 0.0),
        reward_ceiling=0.95,
        surrogate_stages=fs.FinalStage(2),
        surrogate_ceiling=0.95,
        advantage=fs.SignAdvantage(),
    ),
    "TDM and direct RL": _few(DirectReinforcement, levels=2),
}


def _with_rows(make: Callable[[str, torch.dtype, int | None], Objective], sampler: Any, rows: int | None) -> Case:
    return Case(lambda device, dtype: (make(device, dtype, rows), attrs.evolve(sampler, rows=rows)))


OBJECTIVES = {f"{name}, rows {rows}": _with_rows(*parts, rows) for name, parts in _OBJECTIVES.items() for rows in (None, 1, 2)}

_SAMPLERS = {
    "chain": CHAIN,
    "chain, window": ChainSampler(6, samples=3, window=(1, 3)),
    "tree": TREE,
    "tree, graph": attrs.evolve(TREE, keep_graph=True),
    "progress": TreeSampler(8, ProgressPlan(early=(1, 2), late=(3, 5))),
    "promoted": TreeSampler(8, ProgressPlan(early=(1, 2), late=(1, 5), promote_roots=True)),
    "adaptive": TreeSampler(8, AdaptivePlan(low=0.2, high=0.6)),
}
_KERNELS = {"CPS": CPS("mean"), "CPS, sum": CPS("sum"), "FlowSDE": FlowSDE("mean"), "FlowSDE, capped": FlowSDE("mean", 0.97, 0.01)}


def _sampled(kernel: Any, sampler: TrajectorySampler) -> Case:
    return Case(lambda device, dtype: (SoftmaxTB(tiny(device, dtype, kernel=kernel), rows=3), sampler))


SAMPLERS = {
    f"{name}, {kernel}": _sampled(rule, sampler)
    for name, sampler in _SAMPLERS.items()
    for kernel, rule in _KERNELS.items()
    if kernel == "CPS" or name in ("chain", "tree, graph")
}


class _Field(nn.Module):
    """A velocity field that knows no prompt."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, dtype=dtype)
        with torch.no_grad():
            self.body.weight.copy_(torch.arange(16.0).reshape(4, 4) / 16)
            self.body.bias.zero_()

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        moved: Tensor = self.body(latents.to(self.body.weight.dtype) * sigma.view(-1, 1).to(self.body.weight.dtype))
        return moved.to(latents.dtype)


def _wrapped(wrap: Callable[[Policy], Policy]) -> Case:
    return Case(lambda device, dtype: (SoftmaxTB(wrap(tiny(device, dtype))), TREE))


def _network(device: str, dtype: torch.dtype) -> Parts:
    field = NetworkPolicy(_Field(dtype), (4,), decode=lambda latents: latents[:, :3, None, None])
    return SoftmaxTB(field.to(device)), TREE


def _mixture(device: str, dtype: torch.dtype) -> Parts:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=dtype)
    return SoftmaxTB(GaussianMixturePolicy(means, 0.3).to(device)), TREE


def _several(device: str, dtype: torch.dtype) -> Parts:
    return SurrogateReward(student(device, dtype, also=[1, 2], tag=" in {steps} steps")), DrawnSteps([1, 2, 4], samples=4)


def _rolled(rollout: Callable[[], Any], aggregation: Callable[[], Any]) -> Case:
    rewards = {"one": channel_reward, "other": lambda images, prompts: images.mean(dim=(1, 2, 3))}
    return Case(
        lambda device, dtype: (SoftmaxTB(tiny(device, dtype)), TREE),
        lambda: {"rewards": rewards, "rollout": rollout(), "aggregation": aggregation(), "average": Average(0.5), "chunk": 5},
    )


def _scored(how: Callable[[Tensor], Any]) -> Case:
    return Case(
        lambda device, dtype: (SoftmaxTB(tiny(device, dtype)), TREE),
        lambda: {"rewards": {"scores": lambda images, prompts: how(images.mean(dim=(1, 2, 3)))}},
    )


OTHERS = {
    "guided": _wrapped(lambda policy: Guided(policy, 2.0, "blur")),
    "a noisy student": _wrapped(lambda policy: TDMPolicy(policy, steps=5, kernel=CPS())),
    "a guided student": _wrapped(lambda policy: Guided(TDMPolicy(policy, steps=5, kernel=CPS()), 3.0)),
    "a student of several numbers of steps": Case(_several),
    "a network of one's own": Case(_network),
    "a mixture in closed form": Case(_mixture),
    "Euler": Case(lambda device, dtype: (DiffusionNFT(tiny(device, dtype, kernel=Euler())), FEW)),
    "sequential, sum": _rolled(lambda: Sequential(1), StandardizedSum),
    "overlapped, parts": _rolled(lambda: Overlapped(1), StandardizedParts),
    "overlapped in two threads, running scale": _rolled(lambda: Overlapped(2, workers=2), RunningScale),
    "scores from the CPU": _scored(lambda scores: scores.cpu()),
    "scores as numbers": _scored(lambda scores: scores.tolist()),
}

CASES = {**OBJECTIVES, **SAMPLERS, **OTHERS}
