"""Guards alone: which gradients a divergence blocks, and which velocities are too long."""

import attrs
import few_step_cases as few
import pytest
import torch
from tiny import assert_same, batch_of, gradient, pair

from diffalign import AlignmentLoop
from diffalign.core import Edges, group_normalize, replay
from diffalign.objectives import (
    AWM,
    FlowGRPO,
    KLMask,
    NormGuard,
    NormGuarded,
    OnPolicyDistillation,
    SoftmaxTB,
    TrajectoryDistributionMatching,
)
from diffalign.objectives.few_step import InOrder
from diffalign.objectives.noised import NoisedSamples
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward

ADVANTAGE = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
LOG_RATIO = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1, 0.1])
DIVERGENCE = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 0.5])


def test_what_is_far_and_goes_further_is_blocked():
    assert KLMask(1.0).blocked(ADVANTAGE, LOG_RATIO, DIVERGENCE).tolist() == [True, False, False, True, False, False]
    assert not KLMask(3.0).blocked(ADVANTAGE, LOG_RATIO, DIVERGENCE).any()


def test_a_blocked_row_keeps_its_value_and_loses_its_gradient():
    log_ratio = LOG_RATIO.clone().requires_grad_()
    value = KLMask(1.0).surrogate(ADVANTAGE, log_ratio, DIVERGENCE)
    torch.testing.assert_close(value.detach(), -ADVANTAGE * LOG_RATIO.exp())
    (found,) = torch.autograd.grad(value.sum(), log_ratio)
    torch.testing.assert_close(found, -ADVANTAGE * LOG_RATIO.exp() * torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]))


def test_only_longer_velocities_cost():
    reference = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    velocity = torch.tensor([[6.0, 8.0], [0.0, 5.5], [1.0, 0.0]], requires_grad=True)
    guard = NormGuard(weight=2.0, margin=0.05)
    torch.testing.assert_close(guard.excess(velocity, reference), torch.tensor([1.0, 0.1, -0.8], dtype=torch.float64))
    penalty = guard.penalty(velocity, reference)
    torch.testing.assert_close(penalty, torch.tensor([1.9, 0.1, 0.0], dtype=torch.float64))
    (found,) = torch.autograd.grad(penalty.sum(), velocity)
    torch.testing.assert_close(found, torch.tensor([[0.24, 0.32], [0.0, 0.4], [0.0, 0.0]]))  # weight v / (|v| |v_ref|)


def test_a_velocity_as_long_as_the_references_is_not_pulled():
    reference = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    velocity = torch.tensor([[3.0, 4.0], [4.0, 3.0]], requires_grad=True)
    penalty = NormGuard().penalty(velocity, reference)
    assert penalty.tolist() == [0.0, 0.0]
    (found,) = torch.autograd.grad(penalty.sum(), velocity)
    assert not found.any()


def test_at_the_reference_itself_the_guard_pulls_nowhere():
    policy, _ = pair()
    batch, inner = batch_of(policy), SoftmaxTB(policy)
    assert torch.equal(gradient(NormGuarded(inner), batch), gradient(inner, batch))


@pytest.mark.parametrize("make", [lambda: KLMask(0.0), lambda: NormGuard(0.0), lambda: NormGuard(margin=-0.1)])
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_the_mask_of_flow_grpo_blocks_steps_that_have_moved_on():
    policy, _ = pair()
    batch = batch_of(policy)
    free, masked = (FlowGRPO(policy, kl=0.0, clip=None, updates=2, kl_mask=mask) for mask in (None, KLMask(3e-4)))
    assert_same(gradient(masked, batch, 0), gradient(free, batch, 0))  # nothing has moved yet
    with torch.no_grad():
        policy.network.lora_B.weight += 0.03
    edges = Edges.of(batch.trajectories)
    transition = replay(policy, batch.trajectories, edges)
    squares = (transition.mean - batch.trajectories.mean[edges.row]).flatten(1).square().mean(dim=1)
    log_ratio = transition.log_prob(batch.trajectories.latents[edges.child]) - batch.trajectories.log_prob[edges.child]
    advantage = batch.trajectories.node_mean(group_normalize(batch.rewards.double(), batch.trajectories.group))[edges.child]
    blocked = (squares / (2 * transition.std.square()) > 3e-4) & (advantage * log_ratio > 0)
    assert 0 < int(blocked.sum()) < len(blocked)
    per_edge = torch.where(blocked, 0.0, -advantage * log_ratio.exp())
    below = torch.tensor([3.0, 1.0])[(batch.trajectories.level[edges.child] == 3).long()] / 9  # leaves below an edge of a 3 x 3 tree
    expected = torch.autograd.grad((below * per_edge).sum() / 2, list(policy.trainable_parameters().values()))
    assert_same(gradient(masked, batch, 1), torch.cat([part.flatten() for part in expected]), tolerance=1e-7)


@pytest.mark.parametrize("clip", [None, 1e-4, 0.5])
def test_under_a_mask_the_metric_counts_what_the_mask_blocks(clip):
    """The clip is not in force."""
    policy, _ = pair()
    batch = batch_of(policy)
    objective = FlowGRPO(policy, kl=0.0, clip=clip, updates=2, kl_mask=KLMask(3e-4))
    (phase,) = objective.phases()
    (loss,) = phase.losses(batch, 0)
    assert float(loss.metrics["ratio/clipped"][0]) == 0
    with torch.no_grad():
        policy.network.lora_B.weight += 0.03
    (loss,) = phase.losses(batch, 1)
    edges = Edges.of(batch.trajectories)
    with torch.no_grad():
        step = replay(policy, batch.trajectories, edges)
        moved = (step.mean - batch.trajectories.mean[edges.row]).flatten(1).square().mean(dim=1) / (2 * step.std.square())
        log_ratio = step.log_prob(batch.trajectories.latents[edges.child]) - batch.trajectories.log_prob[edges.child]
    advantage = batch.trajectories.node_mean(group_normalize(batch.rewards.double(), batch.trajectories.group))[edges.child]
    blocked, count = loss.metrics["ratio/clipped"]
    assert float(blocked) == int(((moved > 3e-4) & (advantage * log_ratio > 0)).sum()) > 0
    assert float(count) == len(edges.child) > float(blocked)


def test_any_objective_takes_the_guard_of_the_norm():
    policy, reference = pair()
    batch = batch_of(policy)
    inner = SoftmaxTB(policy, reference)
    guarded = NormGuarded(inner, NormGuard(0.7), reference, levels=2)
    alone = gradient(inner, batch)
    samples = NoisedSamples.draw(batch, 2, 0.0, False, "norm_guard/0", "Mine")
    noised = samples.at(torch.arange(len(samples)))
    excess = NormGuard().excess(noised.velocity(policy), noised.velocity(reference).detach())
    assert 0 < int((excess > 0).sum()) < len(excess)
    expected = torch.autograd.grad(0.7 * excess.clamp(min=0).mean(), list(policy.trainable_parameters().values()))
    expected = torch.cat([part.flatten() for part in expected])
    assert_same(gradient(guarded, batch) - alone, expected, tolerance=1e-8)
    assert_same(gradient(attrs.evolve(guarded, rows=3), batch) - alone, expected, tolerance=1e-8)
    assert guarded.policies() == {"policy": policy, "reference": reference, "norm_reference": reference}
    assert guarded.update_rows(9, 4) == 4 + 9 * 2
    assert guarded.behavior() is policy
    with pytest.raises(ValueError, match="needs stochastic steps"):
        guarded.require(DeterministicSampler(4, samples=3).outline(policy))
    with pytest.raises(ValueError, match="reference must be frozen"):
        NormGuarded(inner, reference=policy.fork(trainable=True))


def test_without_a_reference_the_norm_is_held_to_the_weights_of_the_start():
    policy, _ = pair()
    batch, start, inner = batch_of(policy), policy.fork(), SoftmaxTB(policy)
    guarded = NormGuarded(inner, NormGuard(0.7))
    with torch.no_grad():
        policy.network.lora_B.weight += 0.1
    alone = gradient(inner, batch)
    assert_same(gradient(guarded, batch) - alone, gradient(NormGuarded(inner, NormGuard(0.7), start), batch) - alone)


def test_one_sample_of_a_prompt_is_enough_where_the_objective_compares_none():
    """The guard compares nothing, so it asks for no group; an objective that does still asks for its own."""

    def loop(objective):
        return AlignmentLoop(objective, DeterministicSampler(4, samples=1), channel_reward, ["one", "two"], prompts_per_step=2)

    policy = TinyPolicy()
    teacher = policy.fork()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1
    report = loop(NormGuarded(OnPolicyDistillation(policy, {"one": teacher}))).run(2, show=False)
    assert all("norm/penalty" in line for line in report.metrics)
    with pytest.raises(ValueError, match="AWM needs at least 2 samples per prompt"):
        loop(NormGuarded(AWM(TinyPolicy())))
    with pytest.raises(ValueError, match=r"NormGuarded\.levels must be at most .* from sigma_min 0 on, 4; got 5"):
        loop(NormGuarded(OnPolicyDistillation(policy, {"one": teacher}), levels=5))


def test_only_phases_that_train_the_policy_are_guarded():
    student = few.moved(few.tiny_student())
    guarded, batch = NormGuarded(TrajectoryDistributionMatching(student, plan=InOrder())), few.batch_of(student)
    told = {}
    for phase in guarded.phases():
        for loss in phase.losses(batch, 0):
            told.setdefault(tuple(phase.trains), set()).update(name for name in loss.metrics if name.startswith("norm/"))
    assert told == {("fake",): set(), ("generator",): {"norm/excess", "norm/penalty"}}
