"""TDM-R1 between Gaussians, where everything is known: the generator's fixed point is p_psi (p_phi / p_ref)^k."""

import attrs
import pytest
import torch
from few_step_cases import LinearPolicy, MirroredStage

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Hook
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import (
    ExactTarget,
    FixedTime,
    GroupAdvantage,
    NoTrustRegion,
    Reference,
    Squared,
    Unnormalized,
    WeightedMix,
)
from diffalign.objectives.few_step.matching import Predictor
from diffalign.objectives.few_step.reinforcing import Reinforcement
from diffalign.objectives.few_step.stages import Rows
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.testing import ConstantReward

SCALE = 0.7
PSI, PHI, REF = (0.5, -0.5), (1.2, 0.4), (0.2, 0.3)
KEEP = {"distance": Squared(), "normalizer": Unnormalized(), "fake_target": ExactTarget(), "fake_regularization": 0.0}


def gaussian(mean):
    return GaussianMixturePolicy(torch.tensor([mean], dtype=torch.float64), SCALE)


@attrs.frozen(eq=False)
class Given(Reference):
    """A reference that stays what it is."""

    policy: GaussianMixturePolicy

    def start(self, teacher, surrogate):
        return self.policy

    def follow(self, reference, surrogate, progress):
        pass


class Trail(Hook):
    """The student's mean after every step."""

    def __init__(self):
        self.means = []

    def step(self, loop, report):
        self.means.append(loop.objective.policy.policy.mean.detach().clone())


def expected_mean(k):
    psi, phi, ref = (torch.tensor(mean, dtype=torch.float64) for mean in (PSI, PHI, REF))
    return psi + k * (phi - ref)


def run(k, total=200):
    student = TDMPolicy(LinearPolicy((0.0, 0.0), SCALE), steps=1)
    objective = SurrogateReward(
        student,
        gaussian(PSI).fork(),
        surrogate=gaussian(PHI).fork(trainable=True),
        baseline=Given(gaussian(REF).fork()),
        mix=WeightedMix(reward=k, kl=1.0),
        times=FixedTime(0.6),
        surrogate_regularization=0.0,
        **KEEP,
    )
    trail = Trail()
    rates = {"surrogate": 0.0, "fake": 0.1, "generator": 0.15}
    AlignmentLoop(
        objective,
        MirroredStage(1024),
        ConstantReward(),
        Prompts(["a"]),
        prompts_per_step=1,
        optimizers={role: lambda p, rate=rate: torch.optim.SGD(p, lr=rate) for role, rate in rates.items()},
        max_grad_norm=None,
        hooks=[trail],
    ).run(total)
    assert torch.equal(objective.surrogate.means.detach(), gaussian(PHI).means.detach())
    return torch.stack(trail.means[-100:]).mean(dim=0)


def test_the_student_settles_where_the_score_is_the_teachers_plus_k_times_the_surrogates_gain():
    k = 0.5  # not 1, so that a weight that is lost or squared shows
    torch.testing.assert_close(run(k), expected_mean(k), rtol=0, atol=1e-2)


@pytest.mark.parametrize("tau", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("k", [0.0, 0.7, 2.0])
def test_there_and_only_there_the_directions_cancel_at_every_point(k, tau):
    student = TDMPolicy(LinearPolicy((0.3, 0.1), SCALE), steps=1)
    for off in (0.0, 0.1):
        fake = gaussian((expected_mean(k) + off).tolist())
        roles = Reinforcement(
            student,
            Predictor(gaussian(PSI)),
            Predictor(fake),
            Predictor(gaussian(PHI)),
            Predictor(gaussian(REF)),
            WeightedMix(k, 0.0, 1.0),
            Squared(),
            Unnormalized(),
        )
        count = 6
        end = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        zero, at = torch.zeros(count, dtype=torch.float64), torch.full((count,), tau, dtype=torch.float64)
        index = torch.zeros(count, dtype=torch.long)
        rows = Rows(end, end, zero + 1, zero, index, index, index, index, index, index, zero + 1, zero + 1)
        noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        condition = fake.encode([Prompt("a")] * count)
        with torch.no_grad():
            direction, aim = roles.directions(end, rows, (condition, condition), (at, noise), (at, noise))
        assert direction.keys() == aim.keys() == ({"kl", "reward"} if k else {"kl"})
        total = direction["kl"] + k * direction.get("reward", 0.0)
        variance = (1 - tau) ** 2 * SCALE**2 + tau**2
        torch.testing.assert_close(total, torch.full_like(total, -off * tau**2 / variance), rtol=1e-8, atol=1e-10)


def above_one(images, prompts):
    """A liking without gradient: whether the point lies above 1."""
    return (16 * (images[:, 0, 0, 0] - 0.5) > 1).float()


class Rewards(Hook):
    def __init__(self):
        self.values = []

    def step(self, loop, report):
        self.values.append(report.metrics["reward"])


def bandit(k):
    """Mean reward of the last steps, and the divergence of the student from its teacher in nats."""
    teacher = GaussianMixturePolicy(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    student = TDMPolicy(LinearPolicy((0.0,), 1.0), steps=1)
    objective = SurrogateReward(
        student,
        teacher.fork(),
        mix=WeightedMix(reward=k, kl=1.0),
        trust_region=NoTrustRegion(),
        advantage=GroupAdvantage("group"),
        reward_floor=0.0,
        surrogate_floor=0.0,
        **KEEP,
    )
    rewards = Rewards()
    rates = {"surrogate": 0.2, "fake": 0.05, "generator": 0.15}
    AlignmentLoop(
        objective,
        MirroredStage(256),
        above_one,
        Prompts(["a"]),
        prompts_per_step=1,
        optimizers={role: lambda p, rate=rate: torch.optim.SGD(p, lr=rate) for role, rate in rates.items()},
        hooks=[rewards],
    ).run(100)
    return sum(rewards.values[-20:]) / 20, float(student.policy.mean.detach().square() / 2)


def test_a_reward_without_gradient_is_raised_within_a_budget_that_shrinks_with_its_weight():
    start = 0.1587  # of the teacher, N(0, 1)
    much, distance = bandit(1.0)
    little, near = bandit(0.2)
    assert much > start + 0.1
    assert start + 0.01 < little < much - 0.05
    assert near < distance / 3
