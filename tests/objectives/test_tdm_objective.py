"""Distillation: what moves, by what gradient, what it may depend on, and that it teaches."""

import attrs
import pytest
import torch
from few_step_cases import GRID, PROMPTS, LinearPolicy, MirroredStage, assert_same_gradients, batch_of, flat, gradients, moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import CPS, Guided, Progress, ScoredBatch, Streams
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives.few_step import (
    CleanTarget,
    ExactTarget,
    FixedTime,
    Huber,
    InOrder,
    MonteCarlo,
    Overlap,
    PerTerm,
    Separate,
    Squared,
    Together,
    UniformStages,
    Unnormalized,
    WeightedCleanTarget,
)
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.stages import Rows
from diffalign.objectives.noising import diffuse
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import ConstantReward


def distilled(student=None, **options):
    """With a fake that has left the teacher, unless it is given: at the start the generator has nothing to follow."""
    student = student or moved(tiny_student())
    if "fake" not in options:
        options["fake"] = moved(student.fork(pristine=True, trainable=True), 0.1)
    return TrajectoryDistributionMatching(student, **options)


def noisily_reinforced(student):
    return SurrogateReward(student, attribution=MonteCarlo(), fake_regularization=0.0)


def test_stages_replayed_at_unchanged_weights_are_the_stored_ones_bit_for_bit():
    student = moved(tiny_student(torch.float32))
    batch = batch_of(student)
    for stage in range(4):
        rows = Rows.of(batch.trajectories, (stage,))
        with torch.no_grad():
            end, clean = rows.replay(student, batch.trajectories.condition)
        assert torch.equal(end, rows.end)
        assert torch.equal(clean, rows.clean)
        one = rows.select(torch.tensor([3]))
        torch.testing.assert_close(one.replay(student, batch.trajectories.condition)[0], rows.end[3:4], rtol=1e-5, atol=1e-5)


def test_at_the_teacher_nothing_moves_the_student():
    student = tiny_student()
    batch = batch_of(student)
    generator = gradients(distilled(student, fake=None), batch)["generator"]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in generator.values())


def test_the_default_teacher_is_the_policy_without_its_delta_and_the_fake_starts_there():
    student = moved(tiny_student())
    objective = distilled(student, fake=None)
    assert not objective.teacher.policy.network.lora_B.weight.any()
    assert not objective.teacher.trainable_parameters()
    assert not objective.fake.policy.network.lora_B.weight.any()
    assert len(objective.fake.trainable_parameters()) == 2
    assert objective.fake.policy.network.body is student.policy.network.body
    assert set(objective.policies()) == {"generator", "fake", "teacher"}
    assert objective.behavior() is student


@pytest.mark.parametrize("plan", [InOrder(), Together()], ids=repr)
def test_roles_do_not_touch_each_other(plan):
    objective = distilled(plan=plan)
    batch = batch_of(objective.policy)
    policies = objective.policies()
    phases = objective.phases()
    assert [set(phase.trains) for phase in phases] == ([{"fake"}, {"generator"}] if plan == InOrder() else [{"fake", "generator"}])
    for index, role in enumerate(("fake", "generator")):
        for policy in policies.values():
            policy.zero_grad()
        losses = list(phases[min(index, len(phases) - 1)].losses(batch, 0))
        if len(phases) == 1:
            losses = [loss for loss in losses if any(name.startswith(role) for name in loss.metrics)]
        assert losses
        for loss in losses:
            loss.value.backward()
        for name, policy in policies.items():
            for parameter in policy.parameters():
                assert (parameter.grad is not None) == (name == role and parameter.requires_grad), (role, name)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("distance", [Squared(), Huber()], ids=repr)
def test_gradients_do_not_depend_on_the_row_budget(rows, distance):
    student = moved(tiny_student())
    batch = batch_of(student)
    options = {"distance": distance, "fake_regularization": 0.1, "random_end": 0.01}
    expected = gradients(distilled(student, **options), batch)
    assert_same_gradients(gradients(distilled(student, rows=rows, **options), batch), expected)


def test_gradients_add_over_prompts_whatever_else_is_in_the_batch():
    """Two processes with one prompt each do what one process does with both."""
    student = moved(tiny_student())
    whole = gradients(distilled(student), batch_of(student, prompts=PROMPTS[:2], ids=[4, 9], groups=2))
    parts = [gradients(distilled(student), batch_of(student, prompts=[PROMPTS[i]], ids=[[4, 9][i]], groups=2)) for i in range(2)]
    for role, named in whole.items():
        torch.testing.assert_close(flat(named), flat(parts[0][role]) + flat(parts[1][role]), rtol=1e-10, atol=1e-12)


def test_the_generators_gradient_is_that_of_its_formula():
    student = moved(tiny_student())
    teacher = student.fork(pristine=True)
    fake = moved(student.fork(trainable=True), 0.1)
    tau, guidance = 0.95, 2.5
    objective = distilled(
        student, teacher=teacher, fake=fake, guidance=guidance, distance=Squared(), normalizer=PerTerm(), times=FixedTime(tau)
    )
    batch = batch_of(student)
    got = gradients(objective, batch)["generator"]

    rows = Rows.of(batch.trajectories, range(4))
    from diffalign.objectives.few_step.matching import Queries

    _, noise = Queries(Overlap(), FixedTime(tau), shared="sample")(rows, batch.streams, "generator/0")
    condition = batch.trajectories.condition.select(rows.prompt)
    null = student.encode([""]).select(torch.zeros(len(rows), dtype=torch.long))
    velocity = student.velocity(rows.start, rows.sigma, condition)
    s, s_end = rows.sigma[:, None, None], rows.sigma_end[:, None, None]
    clean, end = rows.start - s * velocity, rows.start - (s - s_end) * velocity
    a = (1 - tau) / (1 - s_end)
    noised = (a * end + (tau**2 - (a * s_end) ** 2).sqrt() * noise).detach()
    at = torch.full((len(rows),), tau, dtype=torch.float64)
    with torch.no_grad():
        plain = noised - tau * teacher.velocity(noised, at, condition)
        nothing = noised - tau * teacher.velocity(noised, at, null)
        faked = noised - tau * fake.velocity(noised, at, condition)
        direction = (plain - faked) + (guidance - 1) * (plain - nothing)
        weight = (clean - (nothing + guidance * (plain - nothing))).abs().flatten(1).mean(1)
    loss = ((clean - (clean + direction).detach()).square().flatten(1).mean(1) / weight).mean()  # groups are equally large
    expected = torch.autograd.grad(loss, list(student.trainable_parameters().values()))
    for value, wanted in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-12)


def test_a_guided_teacher_is_a_scale_of_guidance():
    student = moved(tiny_student())
    plain = student.fork(pristine=True)
    options = {"distance": Squared(), "fake_regularization": 0.0}
    batch = batch_of(student)
    by_scale = gradients(distilled(student, teacher=plain, guidance=3.0, **options), batch)
    guided = Guided(plain, 3.0)
    assert_same_gradients(gradients(distilled(student, teacher=guided, **options), batch), by_scale)
    assert isinstance(distilled(student, teacher=guided, fake=None).fake, TDMPolicy)  # a fork of the unguided one


@pytest.mark.parametrize("target", [CleanTarget(), WeightedCleanTarget(), ExactTarget()], ids=repr)
@pytest.mark.parametrize("interval", [Overlap(), Separate()], ids=repr)
def test_every_target_and_interval_trains(target, interval):
    objective = distilled(fake_target=target, interval=interval, stages=UniformStages(2), random_end=0.02)
    for named in gradients(objective, batch_of(objective.policy)).values():
        assert flat(named).isfinite().all()
        assert flat(named).norm() > 0


@pytest.mark.parametrize("make", [distilled, noisily_reinforced])
def test_on_noisy_trajectories_the_fake_learns_from_the_students_own_ends(make):
    noisy = TDMPolicy(moved(tiny_student()).policy, grid=GRID, kernel=CPS())
    with torch.no_grad():
        forest = ChainSampler(4, samples=3).sample(noisy, noisy.encode(PROMPTS), Progress(2, 10), Streams(1, 2))
    rewards = forest.samples.flatten(1)[:, 0].float()
    batch, objective = ScoredBatch(forest, rewards, {"r": rewards}, 3, Progress(2, 10), Streams(1, 2)), make(noisy)
    got = gradients(objective, batch)["fake"]

    stored = Rows.of(forest, range(4))
    condition = forest.condition.select(stored.prompt)
    with torch.no_grad():
        end = noisy.transition(stored.start, stored.sigma, stored.sigma_end, condition, torch.zeros_like(stored.sigma)).mean
    rows = attrs.evolve(stored, end=end)
    assert [torch.allclose(rows.end[rows.stage == stage], stored.end[stored.stage == stage]) for stage in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    tau, noise = Queries(objective.interval, objective.times, shared=objective.shared)(rows, batch.streams, "fake/0")
    noised = diffuse(rows.end, rows.sigma_end, tau, noise)
    target = (noised - rows.clean) / tau[:, None, None]
    value = (objective.fake.velocity(noised, tau, condition) - target).square().flatten(1).mean(dim=1).mean()
    parameters = objective.fake.trainable_parameters()
    expected = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
    assert_same_gradients({"fake": got}, {"fake": expected}, tolerance=1e-6)


def test_random_ends_lie_within_their_stage():
    student = moved(tiny_student())
    objective = distilled(student, random_end=0.02)
    rows = objective._rows(batch_of(student), 0)
    grid = student.sigmas(4)
    assert (rows.sigma_end >= grid[rows.stage + 1]).all()
    assert (rows.sigma_end < rows.sigma - 0.02 + 1e-9).all()
    assert (rows.sigma_end > grid[rows.stage + 1]).any()
    torch.testing.assert_close(rows.replay(student, batch_of(student).trajectories.condition)[0], rows.end)


def test_one_sample_per_prompt_is_enough_and_rewards_do_not_matter():
    student = moved(tiny_student())
    one, other = (batch_of(student, samples=1, reward=ConstantReward(value)) for value in (0.0, 3.0))
    assert_same_gradients(gradients(distilled(student), one), gradients(distilled(student), other), tolerance=0)


def test_batches_without_all_levels_are_refused():
    noisy = TDMPolicy(tiny_student().policy, kernel=CPS())
    loop = AlignmentLoop(distilled(noisy), TreeSampler(4, FixedPlan((2,), branches=2)), ConstantReward(), Prompts(PROMPTS))
    with pytest.raises(ValueError, match=r"needs every level of a trajectory; this batch stores at most 4 of 5. Use DeterministicSampler"):
        loop.run(1)


def test_a_teacher_that_could_move_is_refused():
    student = tiny_student()
    with pytest.raises(ValueError, match=r"teacher must be frozen: 2 parameters require grad"):
        distilled(student, teacher=student.fork(trainable=True))
    with pytest.raises(ValueError, match=r"fake must be a policy of its own that can be trained"):
        distilled(student, fake=student)
    with pytest.raises(ValueError, match=r"fork\(pristine=True\) needs LoRA adapters"):
        distilled(TDMPolicy(GaussianMixturePolicy([[0.0]], 1.0)), fake=None)
    with pytest.raises(ValueError, match=r"InOrder.repeats names the role 'critic'; the roles are fake, generator"):
        distilled(student, plan=InOrder({"critic": 2})).phases()


def test_two_steps_of_a_run_and_the_two_timescale_rule():
    student = moved(tiny_student(torch.float32))
    objective = distilled(student, plan=InOrder({"fake": 3}))
    start = {name: flat(dict(policy.named_parameters())).clone() for name, policy in objective.policies().items()}
    loop = AlignmentLoop(objective, DeterministicSampler(4, samples=2), ConstantReward(), Prompts(PROMPTS), prompts_per_step=2)
    loop.run(2)
    assert loop.running["fake"].state_dict()["state"][0]["step"] == 6
    assert loop.running["generator"].state_dict()["state"][0]["step"] == 2
    for name, policy in objective.policies().items():
        assert torch.equal(flat(dict(policy.named_parameters())), start[name]) == (name == "teacher")


def test_the_generator_rests_during_the_warm_up():
    student = moved(tiny_student(torch.float32))
    for plan in (InOrder(warmup=1), Together(warmup=1)):
        objective = distilled(student.fork(trainable=True), plan=plan)
        weights = flat(objective.policy.trainable_parameters()).clone()
        loop = AlignmentLoop(objective, DeterministicSampler(4, samples=2), ConstantReward(), Prompts(PROMPTS), prompts_per_step=2)
        loop.step(PROMPTS[:2], attrs.evolve(batch_of(student).progress, step=0))
        assert torch.equal(flat(objective.policy.trainable_parameters()), weights)
        loop.step(PROMPTS[:2], attrs.evolve(batch_of(student).progress, step=1))
        assert not torch.equal(flat(objective.policy.trainable_parameters()), weights)


def test_the_student_takes_the_teachers_mean():
    """One Gaussian, one step: the fixed point is the teacher itself."""
    teacher = GaussianMixturePolicy(torch.tensor([[1.5, -0.5]], dtype=torch.float64), 0.7).fork()
    student = TDMPolicy(LinearPolicy((0.0, 0.0), 0.7), steps=1)
    objective = TrajectoryDistributionMatching(
        student, teacher, distance=Squared(), normalizer=Unnormalized(), fake_target=ExactTarget(), times=FixedTime(0.6)
    )
    optimizers = {"fake": lambda p: torch.optim.SGD(p, lr=0.1), "generator": lambda p: torch.optim.SGD(p, lr=0.2)}
    sampler = MirroredStage(256)
    AlignmentLoop(objective, sampler, ConstantReward(), Prompts(["a"]), prompts_per_step=1, optimizers=optimizers, max_grad_norm=None).run(
        100
    )
    torch.testing.assert_close(student.policy.mean.detach(), teacher.means[0].detach(), rtol=0, atol=0.05)
