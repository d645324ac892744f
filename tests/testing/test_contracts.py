"""The contracts: every part of the package keeps its own, and planted faults break them."""

import attrs
import pytest
import torch

from diffalign.core import FlowSDE, Guided, Loss, Objective, Phase, Policy, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.objectives import (
    AWM,
    CRD,
    DGPO,
    RAM,
    DiffusionNFT,
    DirectReinforcement,
    ELBOGroupForwardKL,
    ELBOPolicyGradient,
    ELBOSoftmaxTB,
    FlowGRPO,
    GroupForwardKL,
    NormGuard,
    NormGuarded,
    SoftmaxTB,
    SurrogateReward,
    TrajectoryDistributionMatching,
)
from diffalign.objectives.few_step import InOrder
from diffalign.objectives.requirements import require_comparable
from diffalign.policies import GaussianMixturePolicy
from diffalign.rewards import JPEGCompressibility
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, ProgressPlan, TreeSampler
from diffalign.shapeworld import CompositionalReward, CountReward
from diffalign.testing import PropertyError, TinyPolicy, check_objective, check_policy, check_reward, check_sampler, measure_reward

POLICIES = {
    "network": lambda: TinyPolicy((2, 2)),
    "mixture": lambda: GaussianMixturePolicy([[1.0, 0.0], [-1.0, 0.5]], 0.4, kernel=FlowSDE()),
    "guided": lambda: Guided(TinyPolicy((2, 2)), 3.0),
}
SAMPLERS = {
    "tree": TreeSampler(6, FixedPlan((1, 3))),
    "chunked tree": TreeSampler(6, FixedPlan((1, 3)), rows=2),
    "moving tree": TreeSampler(8, ProgressPlan()),
    "chain": ChainSampler(5, samples=3),
    "deterministic": DeterministicSampler(4, samples=3),
}
OBJECTIVES = {
    "SoftmaxTB": SoftmaxTB,
    "SoftmaxTB, squared": lambda policy: SoftmaxTB(policy, loss="squared"),
    "SoftmaxTB, release": lambda policy: SoftmaxTB.release_compatible(policy, beta=2.0),
    "GroupForwardKL": GroupForwardKL,
    "FlowGRPO": FlowGRPO,
    "FlowGRPO, log-ratio in the reward": lambda policy: FlowGRPO(policy, kl=0.1, kl_in="reward"),
    "DiffusionNFT": DiffusionNFT,
    "DGPO": DGPO,
    "DGPO, rolled out by its average": lambda policy: DGPO(policy, rollouts="old", decay=0.3),
    "AWM": AWM,
    "CRD": CRD,
    "RAM": RAM,
    "ELBOSoftmaxTB": ELBOSoftmaxTB,
    "ELBOGroupForwardKL": ELBOGroupForwardKL,
    "ELBOPolicyGradient": ELBOPolicyGradient,
    # the reward can only be had by longer velocities here, so a weight of 1 allows half of the way
    "SoftmaxTB, guarded": lambda policy: NormGuarded(SoftmaxTB(policy), NormGuard(0.1)),
    # with weight 1 the noise of a fake that has just begun hides what 40 steps of the reward give
    "DirectReinforcement": lambda policy: DirectReinforcement(policy, teacher=policy.fork(), levels=2, weight=20.0),
    "SurrogateReward": lambda policy: SurrogateReward(policy, teacher=policy.fork()),
    "SurrogateReward, in order": lambda policy: SurrogateReward(policy, teacher=policy.fork(), plan=InOrder()),
    "TDM": lambda policy: TrajectoryDistributionMatching(policy, teacher=policy.fork()),
}
SKIPS = {
    "TDM": {"learns": "it follows its teacher; rewards only watch"},
    "SoftmaxTB, guarded": {"frozen reference": "its constructor takes an objective, not a policy; a test of its own refuses one"},
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_their_contract(name):
    findings = check_policy(POLICIES[name]())
    assert len(findings) >= 11


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_their_contract(name):
    check_sampler(SAMPLERS[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_keep_their_contract(name):
    findings = check_objective(OBJECTIVES[name], SKIPS.get(name))
    assert {finding.name for finding in findings if finding.skipped} <= {"frozen reference", *SKIPS.get(name, {})}


@pytest.mark.parametrize("reward", [CountReward(), CompositionalReward(), JPEGCompressibility()], ids=lambda reward: type(reward).__name__)
def test_rewards_keep_their_contract(reward):
    check_reward(reward)


def failed(check, part, **options):
    with pytest.raises(PropertyError) as caught:
        check(part, **options)
    return {finding.name for finding in caught.value.findings if finding.failure}


class Drifting(TinyPolicy):
    """Subclassed for the test only."""

    fault = ""

    def velocity(self, latents, sigma, condition):
        value = super().velocity(latents, sigma, condition)
        if self.fault == "batch":
            return value + value.mean(dim=0, keepdim=True)
        if self.fault == "uncounted":
            self.counter.rows -= len(latents)
        if self.fault == "first sigma":
            return super().velocity(latents, sigma[:1].expand(len(sigma)), condition)
        return value

    def fork(self, *, trainable=False, pristine=False):
        twin = super().fork(trainable=trainable, pristine=pristine)
        if self.fault == "shared":
            twin.network = self.network
        if self.fault == "thawed":
            twin = super().fork(trainable=True)
        return twin


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("batch", "rows apart"),
        ("uncounted", "counted rows"),
        ("first sigma", "mixed levels"),
        ("shared", "forks"),
        ("thawed", "frozen forks"),
    ],
)
def test_a_faulty_policy_is_found(fault, broken):
    policy = Drifting((2, 2))
    policy.fault = fault
    assert broken in failed(check_policy, policy)


@attrs.frozen
class Faulty(TrajectorySampler):
    fault: str
    inner: TrajectorySampler = SAMPLERS["tree"]

    def sample(self, policy, condition, progress, streams):
        if self.fault == "global noise":
            streams = Streams(int(torch.randint(1 << 30, ()).item()))
        if self.fault == "same noise":
            streams = Streams(0)
        if self.fault == "shrinks" and progress.step > 5:
            return TreeSampler(6, FixedPlan((1,))).sample(policy, condition, progress, streams)
        forest = self.inner.sample(policy, condition, progress, streams)
        if self.fault == "log-probs":
            return changed(forest, log_prob=forest.log_prob * 0.5)
        if self.fault == "states":
            moved = forest.latents.clone()
            moved[forest.leaves] += 0.01
            return changed(forest, latents=moved)
        return forest


def changed(forest, **fields):
    names = [field.name for field in attrs.fields(TrajectoryBatch)]
    return TrajectoryBatch(**{**{name: getattr(forest, name) for name in names}, **fields})


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("global noise", "repeatable"),
        ("same noise", "repeatable"),
        ("shrinks", "constant number"),
        ("log-probs", "log-probs"),
        ("states", "deterministic edges"),
    ],
)
def test_a_faulty_sampler_is_found(fault, broken):
    assert broken in failed(check_sampler, Faulty(fault))


@attrs.define(eq=False)
class Wrong(Objective):
    """A policy gradient with one fault planted."""

    policy: object
    fault: str
    rows: int | None = None

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses),)

    def _losses(self, batch, update):
        from diffalign.core import Edges, replay_log_prob
        from diffalign.objectives.terms import centered

        require_comparable(batch.trajectories, "Wrong")
        forest = batch.trajectories
        edges = Edges.of(forest)
        with torch.set_grad_enabled(self.fault != "no_grad"):
            log_prob = replay_log_prob(self.policy, forest, edges)
            path = forest.path_sum(log_prob.new_zeros(len(forest.latents)).index_copy(0, edges.child, log_prob))
        group = torch.zeros_like(forest.group) if self.fault == "one group" else forest.group
        rewards = batch.rewards.double()
        advantage = rewards if self.fault == "not centred" else centered(rewards, group)
        if self.fault == "sign":
            advantage = -advantage
        if self.fault == "tie":  # the first sample is worst where all are equally good
            advantage = torch.zeros_like(rewards)
            for mine in (group == place for place in range(len(forest.condition))):
                index = mine.nonzero().squeeze(1)
                advantage[index[rewards[mine].argmax()]] = 1.0
                advantage[index[rewards[mine].argmin()]] = -1.0
        if self.fault == "random":
            advantage = advantage * torch.rand(len(advantage))
        size = len(forest.leaves) / len(forest.condition)
        denominator = 1 if self.fault == "sum" else batch.groups
        scale = self.rows or 1 if self.fault == "rows" else 1
        if self.fault == "moves":
            with torch.no_grad():
                next(iter(self.policy.trainable_parameters().values())).mul_(1.001)
        yield Loss(-(advantage * path).sum() / size / denominator * scale)


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("sign", "learns"),
        ("one group", "groups apart"),
        ("not centred", "equal rewards"),
        ("tie", "equal rewards"),
        ("sum", "global denominator"),
        ("random", "repeatable"),
        ("no_grad", "trains"),
        ("rows", "row budget"),
        ("moves", "isolated roles"),
    ],
)
def test_a_faulty_objective_is_found(fault, broken):
    assert broken in failed(check_objective, lambda policy: Wrong(policy, fault))


def test_the_same_objective_without_a_fault_keeps_the_contract():
    check_objective(lambda policy: Wrong(policy, ""))


@attrs.define(eq=False)
class Pair(Objective):
    """A fake that follows the student, and a student that goes away from it: two roles that agree when they are built."""

    policy: object
    fault: str = ""
    teacher: Policy | None = None
    fake: object = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.fake = self.policy.fork(trainable=True)

    def phases(self):
        return Phase({"fake": self.fake}, self._fake_losses), Phase({"generator": self.policy}, self._generator_losses)

    def _velocities(self, batch):
        forest = batch.trajectories
        require_comparable(forest, "Pair")
        arguments = forest.samples, forest.samples.new_full((len(forest.leaves),), 0.5), forest.condition.select(forest.group)
        return self.policy.velocity(*arguments), self.fake.velocity(*arguments)

    def _fake_losses(self, batch, update):
        student, fake = self._velocities(batch)
        yield Loss((fake - (student if self.fault == "leak" else student.detach())).square().mean(dim=1).sum() / batch.groups)

    def _generator_losses(self, batch, update):
        student, fake = self._velocities(batch)
        apart = (student - fake).detach()
        apart = torch.zeros_like(apart) if self.fault == "itself" else apart
        yield Loss(-(student * apart).mean(dim=1).sum() / batch.groups)


@pytest.mark.parametrize(("fault", "broken"), [("leak", "isolated roles"), ("itself", "trains"), ("", "frozen reference"), ("", "learns")])
def test_a_faulty_pair_of_roles_is_found(fault, broken):
    assert broken in failed(check_objective, lambda policy: Pair(policy, fault))


def test_a_pair_of_roles_that_agree_when_they_are_built_keeps_the_rest():
    skip = {"frozen reference": "planted: it takes any teacher", "learns": "it sees no reward"}
    findings = check_objective(lambda policy: Pair(policy, ""), skip)
    assert {finding.name for finding in findings if finding.skipped} == {"row budget", *skip}


@pytest.mark.parametrize(
    ("reward", "broken"),
    [
        (lambda images, prompts: torch.rand(len(images)), "repeatable"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3)) - images.mean(), "images apart"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3)).sort().values, "order of images"),
        (lambda images, prompts: images.mul_(0.9).mean(dim=(1, 2, 3)), "images unchanged"),
        (lambda images, prompts: torch.ones(len(images)), "tells images apart"),
        (lambda images, prompts: images.mean(), "one number per image"),
    ],
)
def test_a_faulty_reward_is_found(reward, broken):
    assert broken in failed(check_reward, reward)


def test_a_property_can_be_skipped_with_a_reason():
    constant = lambda images, prompts: torch.ones(len(images))  # noqa: E731
    findings = check_reward(constant, skip={"tells images apart": "it is a constant on purpose"})
    (skipped,) = [finding for finding in findings if finding.skipped]
    assert str(skipped) == "skip  tells images apart: it is a constant on purpose"
    with pytest.raises(ValueError, match="skip names 'typo'"):
        check_reward(constant, skip={"typo": "x"})


def test_a_report_says_what_failed_and_what_it_means():
    with pytest.raises(PropertyError, match=r"breaks 1 of 13 properties:\nFAIL  constant number: a group that shrinks") as caught:
        check_sampler(Faulty("shrinks"))
    assert "got [9, 27]" in str(caught.value)


def test_a_rewards_scale_and_noise_are_measured():
    measured = measure_reward(CountReward())
    assert measured.noise == 0
    assert 0 <= measured.low < measured.mean < measured.high <= 1
    noisy = measure_reward(lambda images, prompts: torch.rand(len(images)), repeats=20)
    assert noisy.noise == pytest.approx(0.29, abs=0.08)
    assert "of the spread" in str(noisy)
