"""Every objective, sampler, plan, rollout and wrapper on the pretended device: two steps end where they end on the CPU, to the bit."""

import attrs
import pytest
import torch

from diffalign import AlignmentLoop, Reward
from diffalign.core import (
    CPS,
    Average,
    Euler,
    FlowSDE,
    Guided,
    Overlapped,
    Raw,
    RunningScale,
    Sequential,
    StandardizedParts,
    StandardizedSum,
)
from diffalign.objectives import DGPO, DiffusionNFT, FlowGRPO, GroupForwardKL, SoftmaxTB, SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives import few_step as fs
from diffalign.policies import GaussianMixturePolicy, NetworkPolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import AdaptivePlan, ChainSampler, DeterministicSampler, DrawnSteps, FixedPlan, ProgressPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

TEXTS = ["a red cube", "two blue stars", "three green disks"]
TREE = TreeSampler(5, FixedPlan((1, 2), branches=3))
ROOTED = TreeSampler(6, FixedPlan((2, 4), branches=2, roots=3))
CHAIN = ChainSampler(5, samples=3)
FEW = DeterministicSampler(4, samples=4)
MANY = DeterministicSampler(8, samples=3)


def tiny(device, **options):
    return TinyPolicy((4, 2, 2), **options).to(device)


def squared(device):
    return tiny(device, kernel=CPS("squared"))


def student(device, guided=False, **options):
    policy = tiny(device, dtype=torch.float32)
    return TDMPolicy(Guided(policy, 2.0) if guided else policy, steps=4, **options)


OBJECTIVES = {
    "SoftmaxTB": (lambda d, r: SoftmaxTB(tiny(d), rows=r), TREE),
    "SoftmaxTB, three updates": (lambda d, r: SoftmaxTB(tiny(d), rows=r, updates=3, reference_weight=0.1), TREE),
    "SoftmaxTB, squared": (lambda d, r: SoftmaxTB(tiny(d), rows=r, loss="squared", level_weights=True), TREE),
    "SoftmaxTB, roots": (lambda d, r: SoftmaxTB(tiny(d), rows=r, center="root", level_weights=True), ROOTED),
    "SoftmaxTB, path": (lambda d, r: SoftmaxTB(tiny(d), rows=r, measure="path", center="none"), CHAIN),
    "release": (lambda d, r: SoftmaxTB.release_compatible(squared(d), rows=r, updates=2, reference_weight=0.1), TREE),
    "GroupForwardKL": (lambda d, r: GroupForwardKL(tiny(d), rows=r, reference_weight=0.1), TREE),
    "FlowGRPO": (lambda d, r: FlowGRPO(tiny(d), rows=r, updates=2), CHAIN),
    "FlowGRPO, in the reward": (lambda d, r: FlowGRPO(tiny(d), rows=r, kl_in="reward", ratio_norm=True, level_weights=True), TREE),
    "DiffusionNFT": (lambda d, r: DiffusionNFT(tiny(d), rows=r, kl=0.1), FEW),
    "DGPO": (lambda d, r: DGPO(tiny(d), rows=r, updates=2), MANY),
    "DGPO, softplus": (lambda d, r: DGPO(tiny(d), rows=r, loss="softplus", clip=None), MANY),
    "TDM": (lambda d, r: TrajectoryDistributionMatching(student(d), rows=r), FEW),
    "TDM, guided": (lambda d, r: TrajectoryDistributionMatching(student(d), rows=r, guidance=2.0), FEW),
    "TDM-R1": (lambda d, r: SurrogateReward(student(d), rows=r), FEW),
    "TDM-R1, guided": (lambda d, r: SurrogateReward(student(d), rows=r, guidance=2.0, reward_guidance=2.0), FEW),
    "TDM-R1, student score": (
        lambda d, r: SurrogateReward(
            student(d), rows=r, reference=fs.StudentScore(), baseline=fs.StudentScore(), group_objective=fs.RewardWeighted()
        ),
        FEW,
    ),
    "TDM-R1, moving reference, in order": (
        lambda d, r: SurrogateReward(
            student(d), rows=r, reference=fs.MovingReference(), plan=fs.InOrder(), reward_stages=2, shared="sample"
        ),
        FEW,
    ),
}


def run(objective, sampler, rewards=channel_reward, steps=2, **options):
    """The weights of every policy after some steps, on the CPU, by role and name."""
    options = {"prompts_per_step": 2, "optimizers": {"default": lambda p: torch.optim.AdamW(p, lr=1e-2)}, **options}
    loop = AlignmentLoop(objective, sampler, rewards, Prompts(TEXTS), **options)
    before = [parameter.detach().clone() for parameter in objective.policy.trainable_parameters().values()]
    loop.run(steps)
    for policy in loop.policies().values():
        assert {parameter.device for parameter in policy.parameters()} == {objective.policy.device}
    after = objective.policy.trainable_parameters().values()
    assert all(not torch.equal(now, then) for now, then in zip(after, before, strict=True))
    return {f"{role}.{name}": p.detach().cpu() for role, policy in loop.policies().items() for name, p in policy.own_parameters().items()}


def same(build, aggregation=Raw, **options):
    """Both devices end with the same weights."""
    there, here = (run(*build(device), aggregation=aggregation(), **options) for device in ("far", "cpu"))
    assert there.keys() == here.keys()
    for name, weights in here.items():
        assert torch.equal(there[name], weights), name


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_under_every_row_budget(name, rows):
    make, sampler = OBJECTIVES[name]
    same(lambda device: (make(device, rows), attrs.evolve(sampler, rows=rows)))


SAMPLERS = {
    "chain": CHAIN,
    "chain, window": ChainSampler(6, samples=3, window=(1, 3)),
    "tree": TREE,
    "tree, graph": attrs.evolve(TREE, keep_graph=True),
    "progress": TreeSampler(8, ProgressPlan(early=(1, 2), late=(3, 5))),
    "promoted": TreeSampler(8, ProgressPlan(early=(1, 2), late=(1, 5), promote_roots=True)),
    "adaptive": TreeSampler(8, AdaptivePlan(low=0.2, high=0.6)),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("kernel", [CPS("mean"), CPS("sum"), FlowSDE("mean"), FlowSDE("mean", sigma_max=0.97, std_floor=0.01)], ids=repr)
def test_every_sampler_plan_and_kernel(sampler, kernel):
    same(lambda device: (SoftmaxTB(tiny(device, kernel=kernel), rows=3), sampler))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("updates", [1, 3])
def test_every_type_of_number(dtype, updates):
    sgd = {"default": lambda parameters: torch.optim.SGD(parameters, lr=1e-1)}  # AdamW's epsilon is 0 in float16
    same(lambda device: (SoftmaxTB(tiny(device, dtype=dtype), rows=2, updates=updates), TREE), optimizers=sgd)


@pytest.mark.parametrize("rollout", [Sequential(1), Overlapped(1), Overlapped(2, workers=2)], ids=repr)
@pytest.mark.parametrize("aggregation", [StandardizedSum, StandardizedParts, RunningScale])
def test_every_rollout_aggregation_and_average(rollout, aggregation):
    rewards = {"one": channel_reward, "other": lambda images, prompts: images.mean(dim=(1, 2, 3))}
    same(
        lambda device: (SoftmaxTB(tiny(device)), TREE),
        rewards=rewards,
        rollout=rollout,
        aggregation=aggregation,
        average=Average(0.5),
        chunk=5,
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda policy: Guided(policy, 2.0, "blur"),
        lambda policy: TDMPolicy(policy, steps=5, kernel=CPS()),
        lambda policy: Guided(TDMPolicy(policy, steps=5, kernel=CPS()), 3.0),
    ],
)
def test_every_wrapper(wrap):
    same(lambda device: (SoftmaxTB(wrap(tiny(device))), TREE))


def test_a_student_of_several_numbers_of_steps():
    def build(device):
        several = student(device, also=[1, 2], tag=" in {steps} steps")
        return SurrogateReward(several), DrawnSteps([1, 2, 4], samples=4)

    same(build)


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 4)

    def forward(self, latents, sigma):
        return self.body(latents * sigma.view(-1, 1))


def test_policies_without_prompts():
    same(lambda device: (SoftmaxTB(NetworkPolicy(Field(), (4,), decode=lambda x: x[:, :3, None, None]).to(device)), TREE))
    means = [[-1.0, 0.0], [1.0, 0.5]]
    same(lambda device: (SoftmaxTB(GaussianMixturePolicy(means, 0.3).to(device)), TREE))


@pytest.mark.parametrize("where", ["the CPU", "the device", "numbers"])
def test_scores_may_come_from_anywhere(where):
    class There(Reward):
        def __call__(self, images, prompts):
            scores = images.mean(dim=(1, 2, 3))
            return {"the CPU": scores.cpu(), "the device": scores, "numbers": scores.tolist()}[where]

    same(lambda device: (SoftmaxTB(tiny(device)), TREE), rewards=There())


def test_kernels_without_noise_serve_deterministic_objectives():
    same(lambda device: (DiffusionNFT(tiny(device, kernel=Euler())), FEW))
