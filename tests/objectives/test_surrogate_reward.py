"""TDM-R1: which role moves by what, what equal rewards do, what the gradient may depend on, and what is refused."""

import attrs
import pytest
import torch
from few_step_cases import PROMPTS, assert_same_gradients, batch_of, flat, gradients, moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import CPS, Linear, NonFiniteError, RewardError
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import (
    AdvantageWeighted,
    Broadcast,
    CleanerStages,
    Discounted,
    EveryStage,
    ExactSoftplus,
    ExactTarget,
    FixedTime,
    FrozenTeacher,
    GroupAdvantage,
    Huber,
    InOrder,
    Joint,
    MonteCarlo,
    MovingReference,
    NoTrustRegion,
    RatioClip,
    ShareMix,
    SigmoidWeighted,
    Snapshot,
    Squared,
    Together,
    UniformStages,
    Unnormalized,
    WeightedMix,
)
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.stages import Rows
from diffalign.objectives.noising import bridge_velocity, diffuse
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import load, save
from diffalign.samplers import ChainSampler, DeterministicSampler
from diffalign.testing import ConstantReward, channel_reward

ROLES = ("surrogate", "fake", "generator")


def reinforced(student=None, apart=True, **options):
    """With a fake and a surrogate that have left the teacher."""
    student = student or moved(tiny_student())
    objective = SurrogateReward(student, **options)
    if apart:
        moved(objective.fake, 0.1)
        moved(objective.surrogate, -0.05)
    return objective


def loop_of(objective, sampler=None, reward=channel_reward, **options):
    return AlignmentLoop(objective, sampler or DeterministicSampler(4, samples=3), reward, Prompts(PROMPTS), prompts_per_step=2, **options)


def test_roles_start_at_the_teacher_and_share_its_body():
    student = moved(tiny_student())
    objective = SurrogateReward(student)
    named = objective.policies()
    assert set(named) == {"generator", "fake", "surrogate", "old_surrogate", "teacher"}
    for role, policy in named.items():
        assert policy.policy.network.body is student.policy.network.body
        assert policy.policy.network.lora_B.weight.any() == (role == "generator")
        assert len(policy.trainable_parameters()) == (2 if role in ROLES else 0)
    assert set(SurrogateReward(student, reference=MovingReference()).policies()) == {*named, "reference"}
    assert set(SurrogateReward(student, baseline=Snapshot()).policies()) == {*named, "baseline"}
    assert objective.behavior() is student


def test_nothing_pulls_at_the_student_while_all_agree_without_guidance():
    student = moved(tiny_student())
    batch = batch_of(student)
    for mix in (ShareMix(), WeightedMix(2.0, 1.0, 1.0)):
        generator = gradients(reinforced(student, apart=False, mix=mix), batch)["generator"]
        assert all(torch.equal(value, torch.zeros_like(value)) for value in generator.values())
    assert flat(gradients(reinforced(student, apart=False, reward_guidance=2.0), batch)["generator"]).norm() > 0


@pytest.mark.parametrize("role", ROLES)
def test_roles_do_not_touch_each_other(role):
    objective = reinforced(plan=InOrder(), reference=MovingReference(), guidance=2.0, reward_guidance=2.0)
    phases = {next(iter(phase.trains)): phase for phase in objective.phases()}
    assert tuple(phases) == ROLES
    policies = objective.policies()
    for policy in policies.values():
        policy.zero_grad()
    before = {name: flat(dict(policy.named_parameters())).clone() for name, policy in policies.items()}
    loop = loop_of(objective, check_rows=0)
    losses = list(phases[role].losses(batch_of(objective.policy), 0))
    for loss in losses:
        loss.value.backward()
    for name, policy in policies.items():
        for parameter in policy.parameters():
            assert (parameter.grad is not None) == (name == role and parameter.requires_grad), name
    loop.running[role].step()
    for name, policy in policies.items():
        assert torch.equal(flat(dict(policy.named_parameters())), before[name]) == (name != role), name


def test_one_phase_trains_what_three_do():
    student = moved(tiny_student())
    batch = batch_of(student)
    together = reinforced(student, plan=Together())
    assert [set(phase.trains) for phase in together.phases()] == [set(ROLES)]
    assert_same_gradients(gradients(reinforced(student, plan=InOrder()), batch), gradients(together, batch), tolerance=0)


@pytest.mark.parametrize(("attribution", "gamma"), [(Broadcast(), 1.0), (Discounted(0.5), 0.5)])  # early stages count as much, or less
def test_the_surrogates_gradient_is_that_of_its_formula(attribution, gamma):
    student, beta, epsilon = moved(tiny_student()), 7.0, 0.02
    objective = reinforced(
        student,
        attribution=attribution,
        group_objective=SigmoidWeighted(beta),
        trust_region=RatioClip(epsilon),
        runaway=1e-4,
        surrogate_regularization=0.1,
        surrogate_stages=EveryStage(),
    )
    moved(objective._beside.old, -0.02)
    batch = batch_of(student)
    got = gradients(objective, batch)["surrogate"]

    rows = Rows.of(batch.trajectories, range(4))
    tau, noise = Queries(objective.interval, objective.times, 0.3, "group", noise_by_group=True)(rows, batch.streams, "surrogate/0")
    assert torch.equal(noise[0], noise[3])  # one noise and one tau for a group
    assert len(tau[rows.group == 0].unique()) == 1
    assert len(noise.flatten(1).unique(dim=0)) == 12
    noised = diffuse(rows.end, rows.sigma_end, tau, noise)
    target = bridge_velocity(rows.end, rows.sigma_end, tau, noise)
    condition = batch.trajectories.condition.select(rows.prompt)

    def velocity(policy):
        return policy.velocity(noised, tau, condition)

    def error(values):
        return (values - target).square().flatten(1).mean(1)

    with torch.no_grad():
        anchor, before = velocity(objective.teacher), error(velocity(objective._beside.old))
        reference = error(anchor)
    rewards = batch.rewards.double().view(3, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(unbiased=False) + 1e-4)
    advantage = advantage.flatten()[rows.sample] * gamma ** (3 - rows.stage)
    mine = velocity(objective.surrogate)
    d, gap = error(mine), (mine - anchor).square().flatten(1).mean(1)
    ratio = (before - d).exp().detach()
    far = gap.detach().view(12, 4).mean(1).repeat_interleave(4) > 1e-4  # rows come draw by draw, group by group
    clipped = torch.where(advantage > 0, (ratio > 1 + epsilon) | (far & (d < reference)), (ratio < 1 - epsilon) | (far & (d > reference)))
    assert 0 < clipped.sum() < len(clipped)
    d = torch.where(clipped, d.detach(), d)
    total = 0.0
    for group in range(12):
        own = slice(4 * group, 4 * group + 4)
        weight = torch.sigmoid((advantage[own] * beta * (d[own] - reference[own])).sum() / 4).detach()
        term = (weight * advantage[own] * d[own]).mean() + 0.1 * gap[own].mean()
        total = total + (rows.stage[4 * group] + 1) / 4 * term / 12
    expected = torch.autograd.grad(total, list(objective.surrogate.trainable_parameters().values()))
    for value, wanted in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-12)


def test_the_generators_gradient_is_that_of_its_formula():
    student, share = moved(tiny_student()), 0.3
    near, far = 0.95, 0.97
    objective = reinforced(
        student, guidance=4.5, reward_guidance=2.5, reward_stages=2, mix=ShareMix(share), times=FixedTime(near), distance=Squared()
    )
    batch = batch_of(student)
    rows = Rows.of(batch.trajectories, range(4))
    reward_queries = Queries(objective.interval, FixedTime(far), 0.3, "group", noise_by_group=True)
    got = []
    for times in (near, far):  # the two branches, apart, each at its own tau
        objective.times = FixedTime(times)
        got.append(gradients(objective, batch)["generator"])
    objective.times = FixedTime(near)

    _, noise = Queries(objective.interval, objective.times, shared="group")(rows, batch.streams, "generator/0")
    _, noise_by_group = reward_queries(rows, batch.streams, "generator/0/reward")
    condition = batch.trajectories.condition.select(rows.prompt)
    null = student.encode([""]).select(torch.zeros(len(rows), dtype=torch.long))
    velocity = student.velocity(rows.start, rows.sigma, condition)
    s, s_end = rows.sigma[:, None, None], rows.sigma_end[:, None, None]
    clean, end = rows.start - s * velocity, (rows.start - (s - s_end) * velocity).detach()

    def at(tau, e):
        a = (1 - tau) / (1 - s_end)
        return a * end + (tau**2 - (a * s_end) ** 2).sqrt() * e

    def f(policy, x, tau, c):
        with torch.no_grad():
            return x - tau * policy.velocity(x, torch.full((len(x),), tau, dtype=torch.float64), c)

    def pull(direction, aim):
        weight = (clean.detach() - aim).abs().flatten(1).mean(1)
        return (clean - (clean + direction).detach()).square().flatten(1).mean(1) / weight

    tau = near
    x, y = at(tau, noise), at(tau, noise_by_group)
    plain, nothing = f(objective.teacher, x, tau, condition), f(objective.teacher, x, tau, null)
    guided = nothing + 4.5 * (plain - nothing)
    kl = pull(plain - f(objective.fake, x, tau, condition), guided)
    cfg = pull(3.5 * (plain - nothing), guided)
    phi, phi_null = f(objective.surrogate, y, tau, condition), f(objective.surrogate, y, tau, null)
    aim = phi_null + 2.5 * (phi - phi_null)
    reward = pull(aim - f(objective.teacher, y, tau, condition), aim)
    loss = torch.where(rows.stage < 2, share * cfg + (1 - share) * reward + kl, share * (cfg + kl)).mean()
    expected = torch.autograd.grad(loss, list(student.trainable_parameters().values()))
    for value, wanted in zip(got[0].values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(flat(got[0]), flat(got[1]))


@pytest.mark.parametrize("group_objective", [SigmoidWeighted(), ExactSoftplus(), AdvantageWeighted()], ids=repr)
def test_equal_rewards_give_the_surrogate_exactly_nothing(group_objective):
    objective = reinforced(group_objective=group_objective, surrogate_regularization=0.0)
    batch = batch_of(objective.policy, reward=ConstantReward(0.1))  # a third of whose triple sum is not 0.1
    surrogate = gradients(objective, batch)["surrogate"]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in surrogate.values())
    mixed = attrs.evolve(batch, rewards=torch.cat([torch.full((4,), 0.1), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.full((4,), 0.7)]))
    some = gradients(objective, mixed)["surrogate"]
    assert flat(some).isfinite().all()
    assert flat(some).norm() > 0


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("group_objective", [SigmoidWeighted(), ExactSoftplus()], ids=repr)
def test_gradients_do_not_depend_on_the_row_budget(rows, group_objective):
    student = moved(tiny_student())
    batch = batch_of(student)
    options = {"group_objective": group_objective, "guidance": 3.0, "reward_guidance": 2.0, "reward_stages": 2}
    expected = gradients(reinforced(student, **options), batch)
    assert_same_gradients(gradients(reinforced(student, rows=rows, **options), batch), expected)


def test_gradients_add_over_prompts_whatever_else_is_in_the_batch():
    student = moved(tiny_student())
    options = {"advantage": GroupAdvantage("group")}  # the standard deviation of a batch is one process's own
    whole = gradients(reinforced(student, **options), batch_of(student, prompts=PROMPTS[:2], ids=[4, 9], groups=2))
    parts = [
        gradients(reinforced(student, **options), batch_of(student, prompts=[PROMPTS[i]], ids=[[4, 9][i]], groups=2)) for i in range(2)
    ]
    for role, named in whole.items():
        torch.testing.assert_close(flat(named), flat(parts[0][role]) + flat(parts[1][role]), rtol=1e-9, atol=1e-12)


def test_equal_texts_are_groups_of_their_own():
    student = moved(tiny_student())
    batch = batch_of(student, prompts=[PROMPTS[0], PROMPTS[0]], ids=[0, 1])
    rows = Rows.of(batch.trajectories, (1, 1))
    assert rows.group.unique().tolist() == [0, 1, 2, 3]
    assert rows.place.tolist() == [0, 1, 2, 3] * 4
    assert float(rows.share.sum()) == pytest.approx(2)  # groups


@pytest.mark.parametrize("where", ["left", "right"])
def test_the_ends_of_the_mix(where):
    objective = reinforced(mix=ShareMix(1.0 if where == "left" else 0.0), guidance=3.0)
    batch = batch_of(objective.policy)
    before = gradients(objective, batch)["generator"]
    moved(objective.surrogate, 0.2)
    assert torch.equal(flat(gradients(objective, batch)["generator"]), flat(before)) == (where == "left")  # no learned reward
    if where == "right":
        objective.guidance = 1.0
        assert not torch.equal(flat(gradients(objective, batch)["generator"]), flat(before))  # the normaliser still sees it


def test_without_rewarded_stages_what_remains_is_distillation():
    student = moved(tiny_student())
    batch = batch_of(student)
    options = {"distance": Squared(), "guidance": 2.0, "normalizer": Unnormalized()}
    few = gradients(reinforced(student, reward_stages=0, mix=ShareMix(1.0), **options), batch)["generator"]
    weights = gradients(reinforced(student, mix=WeightedMix(0.0, 1.0, 1.0), **options), batch)["generator"]
    assert torch.equal(flat(few), flat(weights))
    third = gradients(reinforced(student, reward_stages=0, mix=ShareMix(0.3), **options), batch)["generator"]
    torch.testing.assert_close(flat(third), 0.3 * flat(few))


@pytest.mark.parametrize("which", ["reference", "baseline"])
def test_references_follow_the_surrogate(which):
    student = moved(tiny_student(torch.float32))
    for reference in (FrozenTeacher(), MovingReference(decay=0.0), MovingReference(decay=1.0, first=1.0), Snapshot(every=2)):
        objective = reinforced(student.fork(trainable=True), apart=False, **{which: reference})
        loop = loop_of(objective)
        start = flat(dict(objective.teacher.named_parameters()))
        for step in range(2):
            loop.step(PROMPTS[:2], attrs.evolve(batch_of(student).progress, step=step))
            now = flat(dict(objective.policies().get(which, objective.teacher).named_parameters()))
            phi = flat(dict(objective.surrogate.named_parameters()))
            assert not torch.equal(phi, start)
            copied = reference == MovingReference(decay=0.0) or (reference == Snapshot(2) and step == 1)
            torch.testing.assert_close(now, phi if copied else start, rtol=1e-6, atol=1e-7)


def test_a_reference_that_follows_does_not_take_the_direction_away():
    student = moved(tiny_student())
    batch = batch_of(student)
    copy = MovingReference(decay=0.0)  # the surrogate itself, after each step
    for baseline, pulls in ((FrozenTeacher(), True), (copy, False)):
        objective = reinforced(student, apart=False, reference=copy, baseline=baseline)
        moved(objective.surrogate, -0.05)
        gradients(objective, batch)
        objective.after_step()
        assert torch.equal(flat(dict(objective._beside.reference.named_parameters())), flat(dict(objective.surrogate.named_parameters())))
        assert bool(flat(gradients(objective, batch)["generator"]).any()) is pulls


@pytest.mark.parametrize(("region", "asked"), [(RatioClip(), True), (NoTrustRegion(), False)])
def test_the_old_surrogate_is_asked_only_by_a_trust_region_that_reads_it(region, asked):
    objective = reinforced(moved(tiny_student()), apart=False, trust_region=region, plan=InOrder())
    calls = []
    objective._beside.old.policy.network.register_forward_pre_hook(lambda *_: calls.append(1))
    list(objective.phases()[0].losses(batch_of(objective.policy), 0))
    assert bool(calls) is asked


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, lambda step: 0.001 + 0.001 * step),
        ({"old_decay": 0.5}, lambda step: 0.5),
        ({"old_decay": Linear(1.0, 0.0, 2)}, lambda step: 1 - step / 2),
    ],
    ids=["as released", "number", "schedule"],
)
def test_the_old_surrogate_is_an_average(options, kept):
    objective = reinforced(moved(tiny_student(torch.float32)), apart=False, **options)
    loop = loop_of(objective)
    old = flat(dict(objective._beside.old.named_parameters()))
    for step in range(2):
        loop.step(PROMPTS[:2], attrs.evolve(batch_of(objective.policy).progress, step=step))
        phi = flat(dict(objective.surrogate.named_parameters()))
        old = kept(step) * old + (1 - kept(step)) * phi
        torch.testing.assert_close(flat(dict(objective._beside.old.named_parameters())), old, rtol=1e-5, atol=1e-6)


def test_nothing_follows_without_a_batch():
    objective = reinforced(moved(tiny_student()), apart=False, reference=MovingReference(decay=0.0))
    moved(objective.surrogate, -0.05)
    before = flat(dict(objective._beside.old.named_parameters())), flat(dict(objective._beside.reference.named_parameters()))
    objective.after_step()
    after = flat(dict(objective._beside.old.named_parameters())), flat(dict(objective._beside.reference.named_parameters()))
    assert all(map(torch.equal, before, after))


def test_a_decay_that_cannot_be_is_refused_before_a_weight_moves():
    objective = reinforced(moved(tiny_student()), apart=False, old_decay=1.5)
    with pytest.raises(ValueError, match=r"SurrogateReward.old_decay must lie in \[0, 1\]; got 1.5 at step"):
        gradients(objective, batch_of(objective.policy))


def test_a_moving_reference_keeps_more_of_itself_at_each_step():
    student = moved(tiny_student(torch.float32))
    objective = reinforced(student, apart=False, reference=MovingReference(decay=0.6, first=0.2, rate=0.3))
    loop = loop_of(objective)
    followed = flat(dict(objective._beside.reference.named_parameters()))
    for step, kept in enumerate([0.2, 0.5, 0.6]):
        loop.step(PROMPTS[:2], attrs.evolve(batch_of(student).progress, step=step))
        followed = kept * followed + (1 - kept) * flat(dict(objective.surrogate.named_parameters()))
        torch.testing.assert_close(flat(dict(objective._beside.reference.named_parameters())), followed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"reference": MovingReference(), "group_objective": SigmoidWeighted(2000.0)},
        {"reference": Snapshot(1), "trust_region": NoTrustRegion(), "runaway": None},
        {"fake_target": ExactTarget(), "normalizer": Joint(), "distance": Huber()},
        {"plan": InOrder({"fake": 2}), "mix": WeightedMix(), "stages": UniformStages(2), "surrogate_stages": CleanerStages(3)},
        {"guidance": 3.0, "reward_guidance": 2.0, "reward_stages": 2, "shared": "batch", "weight_by_stage": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_components_are_swapped_freely(options):
    objective = reinforced(moved(tiny_student(torch.float32)), **options)
    before = {name: flat(dict(policy.named_parameters())).clone() for name, policy in objective.policies().items()}
    loop = loop_of(objective)
    loop.run(2)
    for name, policy in objective.policies().items():
        now = flat(dict(policy.named_parameters()))
        assert now.isfinite().all()
        assert torch.equal(now, before[name]) == (name == "teacher")


def test_noisy_trajectories_need_another_attribution():
    noisy = TDMPolicy(moved(tiny_student(torch.float32)).policy, kernel=CPS())
    sampler = ChainSampler(steps=4, samples=3, eta=0.7)
    objective = SurrogateReward(noisy)
    weights = flat(noisy.trainable_parameters()).clone()
    with pytest.raises(ValueError, match=r"Broadcast needs deterministic trajectories, on which a state has one outcome"):
        loop_of(objective, sampler).run(1)
    assert torch.equal(flat(noisy.trainable_parameters()), weights)
    loop_of(SurrogateReward(noisy, attribution=MonteCarlo()), sampler).run(1)


def test_a_lone_sample_is_refused():
    objective = SurrogateReward(moved(tiny_student(torch.float32)))
    with pytest.raises(ValueError, match=r"SurrogateReward needs at least 2 samples per prompt to compare; the sampler draws 1"):
        loop_of(objective, DeterministicSampler(4, samples=1)).run(1)


@pytest.mark.parametrize("field", ["reward_floor", "surrogate_floor"])
@pytest.mark.parametrize("value", [1.0, 1.5, -0.1])
def test_floors_outside_the_unit_interval_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"SurrogateReward.{field} must lie in \[0, 1\): .*; got {value:g}"):
        SurrogateReward(tiny_student(), **{field: value})


def test_a_reward_that_is_not_a_number_moves_nothing():
    objective = SurrogateReward(moved(tiny_student(torch.float32)))
    before = {name: flat(dict(policy.named_parameters())).clone() for name, policy in objective.policies().items()}
    with pytest.raises(RewardError):
        loop_of(objective, reward=lambda images, prompts: images.new_full((len(images),), float("nan"))).run(1)
    for name, policy in objective.policies().items():
        assert torch.equal(flat(dict(policy.named_parameters())), before[name])


def test_a_phase_that_fails_leaves_everything_as_it_was():
    objective = reinforced(moved(tiny_student(torch.float32)), apart=False, plan=InOrder(), reference=MovingReference())
    loop = loop_of(objective)
    loop.step(PROMPTS[:2], attrs.evolve(batch_of(objective.policy).progress, step=0))
    before = {name: flat(dict(policy.named_parameters())).clone() for name, policy in objective.policies().items()}
    calls = []

    def broken(noised, tau, condition, velocity=objective.fake.velocity):
        calls.append(tau)
        return velocity(noised, tau, condition) * float("nan")

    objective.fake.velocity = broken  # in the second phase: the surrogate has stepped by then
    with pytest.raises(NonFiniteError, match=r"role 'fake', step 1: loss is nan"):
        loop.step(PROMPTS[:2], attrs.evolve(batch_of(objective.policy).progress, step=1))
    assert calls
    for name, policy in objective.policies().items():
        assert torch.equal(flat(dict(policy.named_parameters())), before[name]), name


def test_a_resumed_run_goes_on_exactly(tmp_path):
    def start():
        student = moved(tiny_student(torch.float32))
        return SurrogateReward(student, plan=InOrder({"surrogate": 2}), reference=MovingReference())

    whole = start()
    loop_of(whole).run(4)
    first = loop_of(start())
    first.run(2)
    save(first, tmp_path / "step-000002", 2, "")
    second = loop_of(start())
    assert load(second, tmp_path / "step-000002") == 2
    second.run(4, 2)
    for name, policy in whole.policies().items():
        resumed = second.objective.policies()[name]
        assert torch.equal(flat(dict(resumed.named_parameters())), flat(dict(policy.named_parameters()))), name
