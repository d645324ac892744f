"""The loop: the arithmetic of a step, phases, what is undone and refused, hooks, and that a run can be repeated bit for bit."""

import math
import os
import signal

import attrs
import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import (
    CPS,
    Average,
    Hook,
    Interrupted,
    Loss,
    NonFiniteError,
    Objective,
    Phase,
    Progress,
    RewardError,
    StandardizedSum,
    Streams,
    group_mean,
)
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler, FixedPlan, Midpoint, TreeSampler
from diffalign.testing import BrokenReplay, ConstantReward, GivenPlan, TinyPolicy, channel_reward
from diffalign.testing.slow import path_log_prob

PROMPTS = Prompts([Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks"), Prompt("a grey cone")], shuffle=False)
TREE = TreeSampler(5, GivenPlan(Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))))


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def build(objective, **options):
    options = {"optimizers": {"default": sgd(0.1)}, "prompts_per_step": 2, **options}
    return AlignmentLoop(
        objective, options.pop("sampler", TREE), options.pop("rewards", channel_reward), options.pop("prompts", PROMPTS), **options
    )


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def flat(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])


def square(policy, scale=1.0):
    """scale / 2 times the squared norm of the weights: its gradient is scale times the weights."""
    return scale / 2 * sum(parameter.square().sum() for parameter in policy.trainable_parameters().values())


class Phased(Objective):
    """Phases given from outside; writes down what the loop calls."""

    def __init__(self, policy, *phases):
        self.policy, self._phases, self.events = policy, phases, []

    def phases(self):
        return self._phases

    def after_update(self, role):
        self.events.append(role)

    def after_step(self):
        self.events.append("step")


def phase(repeats=1, scale=1.0, **trains):
    def losses(batch, update):
        for policy in trains.values():
            yield Loss(square(policy, scale))

    return Phase(trains, losses, repeats)


class Recorder(Hook):
    def __init__(self, events, name="hook", on_step=lambda report: None):
        self.events, self.name, self.on_step = events, name, on_step

    def start(self, loop, step, total):
        self.events.append((self.name, "start", step, total))

    def step(self, loop, report):
        self.events.append((self.name, "step", report.step, report.total))
        self.on_step(report)

    def stop(self, loop, step, error):
        self.events.append((self.name, "stop", step, type(error).__name__))


# --- one step ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e9])
def test_a_step_is_what_one_would_write_by_hand(max_grad_norm):
    policy = TinyPolicy((2, 2), kernel=CPS("sum"), dtype=torch.float64)
    twin = policy.fork(trainable=True)
    reference = policy.fork()
    with torch.no_grad():
        for each in (policy, twin):
            each.network.lora_B.weight += 0.2
    loop = build(SoftmaxTB(policy, reference, beta=3.0), max_grad_norm=max_grad_norm, seed=11, aggregation=StandardizedSum())
    report = loop.step(PROMPTS.draw(4, 2), Progress(4, 9))

    with torch.no_grad():
        forest = TREE.sample(twin, twin.encode(PROMPTS.draw(4, 2)), Progress(4, 9), Streams(11, 4))
        images = twin.decode(forest.samples)
        log_ref = path_log_prob(reference, forest)
    raw = channel_reward(images, [forest.condition.prompts[index] for index in forest.group.tolist()]).float()
    rewards = StandardizedSum()({"channel_reward": raw}, forest.group).double()
    gap = (path_log_prob(twin, forest) - log_ref).detach() - 3.0 * rewards
    advantage = group_mean(gap, forest.group) - gap
    loss = -(advantage * path_log_prob(twin, forest)).mean()  # on policy the ratio has the gradient of the log-prob
    loss.backward()
    gradients = [parameter.grad for parameter in twin.trainable_parameters().values()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (float(norm) + 1e-6))
    with torch.no_grad():
        for parameter, gradient in zip(twin.trainable_parameters().values(), gradients, strict=True):
            parameter -= 0.1 * scale * gradient

    torch.testing.assert_close(flat(policy), flat(twin), rtol=1e-10, atol=1e-12)
    assert report.metrics["grad_norm/policy"] == pytest.approx(float(norm), rel=1e-9)
    assert report.metrics["reward"] == report.metrics["reward/channel_reward"] == pytest.approx(float(raw.mean()))
    assert report.metrics["reward/group_std"] == pytest.approx(float(raw.reshape(2, 6).std(dim=1, unbiased=False).mean()), rel=1e-5)
    assert report.metrics["contract/deviation"] < 1e-9
    assert torch.equal(report.batch.trajectories.latents, forest.latents)
    assert torch.equal(report.images, images)
    assert report.prompts == tuple(forest.condition.prompts[index] for index in forest.group.tolist())
    assert (report.step, report.total) == (4, 9)


def test_one_step_of_the_paper_costs_42_rows_and_13():
    policy, sizes = TinyPolicy(), []
    objective = SoftmaxTB(policy)
    policy.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))  # after the reference was forked
    loop = build(objective, sampler=TreeSampler(6, FixedPlan((2, 3, 4))), prompts_per_step=1, check_rows=0)
    report = loop.step(PROMPTS.draw(0, 1), Progress(0, 1))
    assert sizes == [1, 1, 1, 3, 9, 27, 13]
    assert report.ledger.rows == {"policy/rollout": 42, "policy/update": 13, "reference/update": 13}
    assert report.ledger.calls == {"policy/rollout": 6, "policy/update": 1, "reference/update": 1}


def test_all_prompts_share_the_calls_and_the_contract_has_its_own_rows():
    loop = build(SoftmaxTB(TinyPolicy()), sampler=TreeSampler(6, FixedPlan((2, 3, 4))), prompts_per_step=4)
    loop.run(2)
    contract = (4 + 12 + 36) + 1 + 12  # all stochastic calls, and a row on rounding; then one of them
    rows = {"policy/rollout": 2 * 4 * 42, "policy/contract": contract, "policy/update": 2 * 4 * 13, "reference/update": 2 * 4 * 13}
    assert loop.ledger.rows == rows
    assert loop.ledger.calls == {"policy/rollout": 12, "policy/contract": 3 + 1 + 1, "policy/update": 2, "reference/update": 2}
    assert set(loop.ledger.seconds) == {"encode", "rollout", "decode", "reward", "contract", "update"}


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_images_are_decoded_and_scored_in_chunks(chunk):
    sizes, seen = [], []

    def reward(images, prompts):
        sizes.append(len(images))
        seen.extend(prompts)
        return channel_reward(images, prompts)

    loop = build(SoftmaxTB(TinyPolicy()), rewards={"r": reward}, chunk=chunk, keep_images=7)
    report = loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    expected = build(SoftmaxTB(TinyPolicy()), keep_images=7).step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert sizes == [min(chunk, 12 - start) for start in range(0, 12, chunk)]
    assert seen == ["a red cube"] * 6 + ["two blue stars"] * 6
    torch.testing.assert_close(report.batch.rewards, expected.batch.rewards)
    torch.testing.assert_close(report.images, expected.images)
    assert report.images.shape == (7, 3, 1, 1)
    assert len(report.prompts) == 7


def test_rewards_see_the_metadata_of_their_prompts():
    def target(images, prompts):
        return [float(prompt.metadata["target"]) for prompt in prompts]

    prompts = Prompts([Prompt("one", {"target": 1}), Prompt("two", {"target": 2})], shuffle=False)
    report = build(SoftmaxTB(TinyPolicy()), rewards=target, prompts=prompts).step(prompts.draw(0, 2), Progress(0, 1))
    assert report.batch.rewards.tolist() == [1.0] * 6 + [2.0] * 6
    assert report.batch.deviation == pytest.approx(0.5)  # of all samples, as a population: there are no others in the step


def test_plain_strings_serve_as_prompts():
    report = build(SoftmaxTB(TinyPolicy())).step(["a", "b"], Progress(0, 1))
    assert [type(prompt) for prompt in report.batch.trajectories.condition.prompts] == [Prompt, Prompt]


def test_several_rewards_are_logged_raw_and_aggregated_by_weight():
    rewards = {"a": channel_reward, "b": lambda images, prompts: images[:, 2, 0, 0]}
    loop = build(SoftmaxTB(TinyPolicy()), rewards=rewards, aggregation=StandardizedSum({"a": 2.0, "b": -1.0}))
    report = loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    parts = report.batch.parts
    assert report.metrics["reward/a"] == pytest.approx(float(parts["a"].mean()))
    assert report.metrics["reward/b"] == pytest.approx(float(parts["b"].mean()))
    assert report.metrics["reward"] == pytest.approx(float((2 * parts["a"] - parts["b"]).mean()))  # raw, not standardised
    assert report.batch.rewards.mean().abs() < 1e-5
    assert loop.named_rewards() == rewards


def test_the_mean_reward_of_a_step_is_the_progress_of_the_next():
    seen = []

    policy = TinyPolicy()

    def losses(batch, update):
        seen.append((batch.progress, batch.streams, batch.groups))
        yield Loss(square(policy))

    loop = build(Phased(policy, Phase({"policy": policy}, losses)), seed=5)
    reports = []
    loop.hooks = [Recorder([], on_step=reports.append)]
    loop.run(3)
    rewards = [None, *(report.metrics["reward"] for report in reports)]
    assert seen == [(Progress(step, 3, rewards[step]), Streams(5, step), 2) for step in range(3)]


# --- phases -----------------------------------------------------------------------------------------------------------------


def test_phases_run_in_order_with_their_repeats_and_everything_in_one_steps_at_its_end():
    fake, generator, critic = (TinyPolicy(seed=seed) for seed in range(3))
    order = []

    def losses(name, *policies):
        def generate(batch, update):
            for policy in policies:
                order.append((name, update, float(flat(fake)[0])))
                yield Loss(square(policy))

        return generate

    start = {policy: flat(policy) for policy in (fake, generator, critic)}
    first = float(flat(fake)[0])
    objective = Phased(
        generator,
        Phase({"fake": fake, "critic": critic}, losses("two", fake, critic)),
        Phase({"generator": generator}, losses("one", generator), repeats=3),
    )
    build(objective, max_grad_norm=None).run(1)
    # gradient = weights, so a step of rate 0.1 multiplies by 0.9
    torch.testing.assert_close(flat(fake), 0.9 * start[fake])
    torch.testing.assert_close(flat(critic), 0.9 * start[critic])
    torch.testing.assert_close(flat(generator), 0.9**3 * start[generator])
    moved = float(flat(fake)[0])
    assert order == [("two", 0, first), ("two", 0, first), ("one", 0, moved), ("one", 1, moved), ("one", 2, moved)]
    assert objective.events == ["fake", "critic", "generator", "generator", "generator", "step"]


def test_micro_batches_add_up():
    def movement(split):
        policy = TinyPolicy()

        def losses(batch, update):
            for share in split:
                yield Loss(square(policy, share), {"n": (torch.tensor(share), torch.tensor(1))})

        loop = build(Phased(policy, Phase({"policy": policy}, losses)), max_grad_norm=None)
        return flat(policy), loop.step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics["n"], flat(policy)

    before, mean, after = movement([0.25, 0.5, 0.25])
    torch.testing.assert_close(after, movement([1.0])[2])
    torch.testing.assert_close(after, 0.9 * before)
    assert mean == pytest.approx(1 / 3)


def test_a_loss_without_a_graph_moves_nothing_and_is_no_error_where_rewards_are_equal():
    policy = TinyPolicy()
    before = weights(policy)
    objective = Phased(policy, Phase({"policy": policy}, lambda batch, update: iter([Loss(torch.tensor(1.0)), Loss(torch.tensor(0))])))
    report = build(objective, rewards=ConstantReward()).step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert same(weights(policy), before)
    assert report.metrics["grad_norm/policy"] == 0


def test_gradients_are_clipped_per_role():
    large, small = TinyPolicy(seed=0), TinyPolicy(seed=1)
    start = flat(large), flat(small)

    def losses(batch, update):
        yield Loss(square(large, 1000.0) + square(small, 1e-3))

    report = build(Phased(large, Phase({"large": large, "small": small}, losses)), max_grad_norm=0.5).step(
        PROMPTS.draw(0, 2), Progress(0, 1)
    )
    assert (flat(large) - start[0]).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    torch.testing.assert_close(flat(small), (1 - 1e-4) * start[1], rtol=1e-6, atol=0)
    assert report.metrics["grad_norm/large"] == pytest.approx(1000 * float(start[0].norm()), rel=1e-5)


def test_optimizers_are_given_by_role_with_a_default():
    one, other, third = (TinyPolicy(seed=seed) for seed in range(3))
    objective = Phased(one, phase(one=one), phase(other=other))
    loop = build(objective, optimizers={"one": sgd(0.5), "default": sgd(0.25)}, max_grad_norm=None)
    assert [loop.running[role].param_groups[0]["lr"] for role in ("one", "other")] == [0.5, 0.25]
    loop = build(Phased(third, phase(third=third)), optimizers={})
    assert isinstance(loop.running["third"], torch.optim.AdamW)
    assert loop.running["third"].param_groups[0]["lr"] == 1e-4


# --- what is undone ---------------------------------------------------------------------------------------------------------


def failing(kind):
    def losses(batch, update, policy):
        if kind == "raises":
            raise ValueError("the second phase fails")
        if kind == "nan loss":
            yield Loss(square(policy) * float("nan"))
        if kind == "infinite gradient":
            parameter = next(iter(policy.trainable_parameters().values()))
            yield Loss((parameter - parameter.detach()).abs().sum().sqrt())
        if kind == "last update":
            yield Loss(square(policy) * (float("nan") if update == 2 else 1.0))

    return losses


@pytest.mark.parametrize("kind", ["raises", "nan loss", "infinite gradient", "last update"])
@pytest.mark.parametrize("steps", [0, 1])
def test_if_a_later_phase_fails_everything_is_as_it_was(kind, steps):
    fake, generator = TinyPolicy(seed=0), TinyPolicy(seed=1)
    later = failing(kind)

    def losses(batch, update):
        if batch.progress.step < steps:
            yield Loss(square(generator))
        else:
            yield from later(batch, update, generator)

    objective = Phased(generator, phase(fake=fake), Phase({"generator": generator}, losses, repeats=3))
    loop = build(objective, optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.1)})
    for step in range(steps):
        loop.step(PROMPTS.draw(0, 2), Progress(step, 2))
    before = weights(fake), weights(generator)
    state = {role: str(optimizer.state_dict()) for role, optimizer in loop.running.items()}
    reward = loop.reward
    with pytest.raises((ValueError, NonFiniteError)):
        loop.step(PROMPTS.draw(0, 2), Progress(steps, 2))
    assert same(weights(fake), before[0])
    assert same(weights(generator), before[1])
    assert {role: str(optimizer.state_dict()) for role, optimizer in loop.running.items()} == state
    assert loop.reward == reward


def test_a_role_that_fails_in_its_own_phase_takes_the_others_back():
    one, other = TinyPolicy(seed=0), TinyPolicy(seed=1)

    class Fails(Phased):
        def after_update(self, role):
            if role == "other":
                raise RuntimeError("the old policy is gone")

    loop = build(Fails(one, phase(one=one, other=other)))
    before = weights(one), weights(other)
    with pytest.raises(RuntimeError, match="the old policy is gone"):
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert same(weights(one), before[0])
    assert same(weights(other), before[1])


def test_a_loss_that_is_not_finite_is_named_by_role_and_step():
    policy = TinyPolicy()
    before = weights(policy)
    loop = build(Phased(policy, phase(generator=policy, scale=float("inf"))))
    with pytest.raises(
        NonFiniteError, match=r"^role 'generator', step 3: loss is inf. The velocities .* are finite \(prompts 'a red cube', "
    ):
        loop.step(PROMPTS.draw(0, 2), Progress(3, 9))
    assert same(weights(policy), before)


def test_a_gradient_that_is_not_finite_is_named_by_its_tensor():
    policy = TinyPolicy()
    before = weights(policy)

    def losses(batch, update):
        parameter = policy.network.lora_B.weight
        yield Loss((parameter - parameter.detach()).abs().sum().sqrt())  # finite, with an infinite slope

    loop = build(Phased(policy, Phase({"generator": policy}, losses)))
    message = r"^role 'generator', step 3: gradient of 'network.lora_B.weight' is not finite. The velocities .* Nothing was updated.$"
    with pytest.raises(NonFiniteError, match=message):
        loop.step(PROMPTS.draw(0, 2), Progress(3, 9))
    assert same(weights(policy), before)


def test_a_gradient_whose_norm_overflows_is_refused_too():
    policy = TinyPolicy()

    def losses(batch, update):
        yield Loss(policy.network.lora_A.weight.sum() * 1e25 + policy.network.lora_B.weight.sum())

    loop = build(Phased(policy, Phase({"policy": policy}, losses)))
    with pytest.raises(NonFiniteError, match=r"gradient of 'network.lora_A.weight' is not finite"):
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))


class Blinds(TinyPolicy):
    """NaN below one sigma."""

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        return torch.where((sigma < 0.6)[:, None] & (condition.ids == 1)[:, None], float("nan"), velocity)


def test_latents_that_are_not_finite_are_named_by_level_and_prompt():
    loop = build(Phased(policy := Blinds(), phase(policy=policy)))
    sigmas = policy.sigmas(5)
    level = int((sigmas < 0.6).nonzero()[0]) + 1
    with pytest.raises(NonFiniteError, match=rf"^role 'policy', step 0, rollout: latents are not finite at level {level} ") as caught:
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert f"(sigma {sigmas[level]:.4g}), prompt 'two blue stars'. The velocity at its parent (level {level - 1}) is not" in str(
        caught.value
    )


def test_a_reward_that_is_not_finite_stops_the_step_before_anything_moves():
    policy = TinyPolicy()
    before = weights(policy)
    loop = build(SoftmaxTB(policy), rewards={"r": lambda images, prompts: [1.0] * 11 + [float("nan")]})
    with pytest.raises(RewardError, match="r returned nan for image 11 of 12, prompt 'two blue stars'"):
        loop.run(1)
    assert same(weights(policy), before)


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_losses_that_yield_inside_a_block_are_refused_and_leave_no_trace(block):
    policy = TinyPolicy()
    before = weights(policy)

    def losses(batch, update):
        with block():
            yield Loss(square(policy))

    loop = build(Phased(policy, Phase({"policy": policy}, losses)))
    with pytest.raises(RuntimeError, match="the losses of policy yielded inside no_grad or autocast"):
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert same(weights(policy), before)


def test_dropout_is_refused_while_it_is_on():
    policy = TinyPolicy()
    policy.network.body.append(torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"role 'policy': 'network.body.3' has dropout 0.1; replay could not be exact. Set it to 0."):
        build(SoftmaxTB(policy))
    policy.eval()
    build(SoftmaxTB(policy))
    policy.train()
    policy.network.body[3].p = 0.0
    build(SoftmaxTB(policy))


def test_a_role_without_trainable_weights_is_refused():
    with pytest.raises(ValueError, match="role 'policy' has nothing to train: no parameter requires grad"):
        build(SoftmaxTB(TinyPolicy().fork()))


def test_an_optimizer_for_no_role_is_refused():
    with pytest.raises(ValueError, match="optimizers has an entry 'critic'; the roles are policy, or 'default' for all"):
        build(SoftmaxTB(TinyPolicy()), optimizers={"critic": sgd(0.1), "policy": sgd(0.1)})


@pytest.mark.parametrize(
    "options", [{"prompts_per_step": 0}, {"max_grad_norm": 0.0}, {"chunk": 0}, {"check_rows": -1}], ids=lambda options: next(iter(options))
)
def test_numbers_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"'{next(iter(options))}' must be >"):
        build(SoftmaxTB(TinyPolicy()), **options)


@pytest.mark.parametrize(("total", "start"), [(3, 4), (3, -1)])
def test_a_start_outside_the_run_is_refused(total, start):
    with pytest.raises(ValueError, match=rf"start must lie between 0 and total = {total}; got {start}"):
        build(SoftmaxTB(TinyPolicy())).run(total, start)


def test_a_slip_of_one_sigma_index_fails_before_a_weight_moves_and_names_the_level():
    policy = BrokenReplay(TinyPolicy(), "sigma", 5)
    before = weights(policy)
    with pytest.raises(RuntimeError, match=r"first-step contract: .* At level 1 \(sigma 0.8889 -> 0.75\)"):
        build(SoftmaxTB(policy), check_rows=1).run(1)
    assert same(weights(policy), before)
    build(SoftmaxTB(BrokenReplay(TinyPolicy(), "sigma", 5)), check_rows=0).run(1)  # switched off, the slip goes unnoticed


def test_the_behaviour_policy_rolls_out_and_is_held_to_the_contract():
    policy = TinyPolicy()
    old = policy.fork()

    class Delayed(Phased):
        def behavior(self):
            return old

        def policies(self):
            return {"policy": policy, "old": old}

    with torch.no_grad():
        policy.network.lora_B.weight += 1.0
    report = build(Delayed(policy, phase(policy=policy))).step(PROMPTS.draw(0, 2), Progress(0, 1))
    with torch.no_grad():
        expected = TREE.sample(old, old.encode(PROMPTS.draw(0, 2)), Progress(0, 1), Streams(0, 0))
    assert torch.equal(report.batch.trajectories.latents, expected.latents)
    assert report.metrics["contract/deviation"] < 1e-5


@pytest.mark.parametrize("solver", [None, Midpoint()], ids=["steps", "ends"])
def test_deterministic_samplers_have_no_contract_to_break_and_say_no_number(solver):
    policy = TinyPolicy()
    loop = build(Phased(policy, phase(policy=policy)), sampler=DeterministicSampler(3, samples=2, solver=solver))
    metrics = loop.step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics
    assert not [name for name in metrics if name.startswith("contract/")]
    assert "rows/policy/contract" not in metrics


# --- hooks and signals ------------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_around_every_step():
    events = []
    loop = build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events, "a"), Recorder(events, "b"), Hook()])
    loop.run(3, start=1)
    expected = [("start", 1, 3), ("step", 1, 3), ("step", 2, 3), ("stop", 3, "NoneType")]
    assert events == [(name, *event) for event in expected for name in ("a", "b")]


def test_hooks_of_rewards_start_first_because_others_ask_rewards_and_come_last_because_they_may_end_the_run():
    class Attended:
        def __call__(self, images, prompts):
            return channel_reward(images, prompts)

        def hook(self):
            return Recorder(events, "reward", end)

    def end(report):
        if report.step == 1:
            raise Interrupted("enough")

    events = []
    loop = build(SoftmaxTB(TinyPolicy()), rewards=Attended(), hooks=[Recorder(events, "run")])
    with pytest.raises(Interrupted):
        loop.advance(3, also=[Recorder(events, "also")])
    assert events[:3] == [(name, "start", 0, 3) for name in ("reward", "run", "also")]
    then = [("step", 0, 3), ("step", 1, 3), ("stop", 2, "Interrupted")]
    assert events[3:] == [(name, *event) for event in then for name in ("run", "also", "reward")]


def test_a_run_of_no_steps_starts_and_stops():
    events = []
    build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events)]).run(2, start=2)
    assert events == [("hook", "start", 2, 2), ("hook", "stop", 2, "NoneType")]


def test_hooks_hear_of_an_error_with_the_steps_that_are_done():
    events = []

    def reward(images, prompts):
        return [float("nan") if ("hook", "step", 1, 5) in events else 1.0] * len(images)

    with pytest.raises(RewardError):
        build(SoftmaxTB(TinyPolicy()), rewards=reward, hooks=[Recorder(events)]).run(5)
    assert events[-2:] == [("hook", "step", 1, 5), ("hook", "stop", 2, "NonFiniteRewardError")]


def test_an_error_in_a_hook_stops_the_run_after_its_step():
    events = []

    def fail(report):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events, on_step=fail)]).run(5)
    assert events == [("hook", "start", 0, 5), ("hook", "step", 0, 5), ("hook", "stop", 1, "OSError")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_between_steps(number):
    events = []
    policy = TinyPolicy()

    def reward(images, prompts):
        if ("hook", "step", 0, 9) in events:
            os.kill(os.getpid(), number)  # in the middle of the second step
        return channel_reward(images, prompts)

    loop = build(SoftmaxTB(policy), rewards={"channel_reward": reward}, hooks=[Recorder(events)])
    with pytest.raises(KeyboardInterrupt, match=number.name):
        loop.run(9)
    assert events[1:] == [("hook", "step", 0, 9), ("hook", "step", 1, 9), ("hook", "stop", 2, "Interrupted")]
    whole = build(SoftmaxTB(other := TinyPolicy()))
    whole.run(2)
    assert same(weights(policy), weights(other))


# --- repetition, averages, several processes --------------------------------------------------------------------------------


def trained(steps=3, seed=0, **options):
    policy = TinyPolicy()
    loop = build(SoftmaxTB(policy, rows=5, updates=2), optimizers={}, seed=seed, **options)
    loop.run(steps)
    return policy


def test_two_runs_are_equal_bit_for_bit():
    torch.manual_seed(1)
    one = trained()
    torch.manual_seed(2)
    assert same(weights(trained()), weights(one))
    assert not same(weights(trained(seed=1)), weights(one))


def test_a_run_in_two_parts_is_the_run_in_one():
    policy = TinyPolicy()
    loop = build(SoftmaxTB(policy, rows=5, updates=2), optimizers={})
    loop.run(2)
    loop.run(4, start=2)
    assert same(weights(policy), weights(trained(4)))


def test_the_average_follows_the_policy_and_is_what_one_evaluates():
    policy, average = TinyPolicy(), Average(decay=0.5)
    loop = build(SoftmaxTB(policy), average=average)
    start = weights(average.policy)
    assert same(start, weights(policy))
    loop.run(1)
    assert loop.evaluation_policy() is average.policy
    for name, value in weights(policy).items():  # decay of the first step: min(1 / 10, 0.5)
        torch.testing.assert_close(weights(average.policy)[name], 0.1 * start[name] + 0.9 * value)
    assert build(SoftmaxTB(policy)).evaluation_policy() is policy


@attrs.define
class Rank:
    """One of several processes, whose gradients are kept instead of exchanged."""

    rank: int
    size: int
    gradients: list = attrs.field(factory=list)

    def sum(self, values):
        return values

    def maximum(self, values):
        return values

    def gather(self, values):
        return values

    def sum_gradients(self, parameters):
        self.gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    def barrier(self):
        pass


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_the_ranks_add_up_to_that_of_one_process(size):
    def gradient(rank, size):
        policy = TinyPolicy(dtype=torch.float64)
        devices = Rank(rank, size)
        loop = build(SoftmaxTB(policy, policy.fork(pristine=True)), devices=devices, prompts_per_step=4)
        report = loop.step(PROMPTS.draw(0, 4), Progress(0, 1))
        return devices.gradients[0], report.batch

    whole, batch = gradient(0, 1)
    parts = [gradient(rank, size) for rank in range(size)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole, rtol=0, atol=1e-10 * float(whole.norm()))
    assert all(share.groups == 4 for _, share in parts)
    for rank, (_, share) in enumerate(parts):
        ids = share.trajectories.condition.ids.tolist()
        assert ids == list(range(4))[rank::size]
        for place, prompt in enumerate(ids):
            mine, theirs = share.rewards[share.trajectories.group == place], batch.rewards[batch.trajectories.group == prompt]
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_metrics_are_summed_over_processes_before_they_are_divided():
    class Doubled(Rank):
        def sum(self, values):
            return values + torch.tensor([[1.0, 3.0]])  # another process that adds 1 over 3 samples to everything

    policy = TinyPolicy()

    def losses(batch, update):
        yield Loss(square(policy), {"mine": (torch.tensor(5.0), torch.tensor(2))})

    report = build(Phased(policy, Phase({"policy": policy}, losses)), devices=Doubled(0, 1)).step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert report.metrics["mine"] == pytest.approx(6 / 5)
    assert report.metrics["reward"] == pytest.approx((float(report.batch.rewards.sum()) + 1) / (12 + 3))
    assert math.isfinite(report.metrics["memory/peak_bytes"])
