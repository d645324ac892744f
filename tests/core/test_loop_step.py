"""The loop: the arithmetic of a step, and its phases."""

import pytest
import torch
from loops import PROMPTS, TREE, Phased, Recorder, build, flat, phase, same, sgd, square, weights

from diffalign import Prompt
from diffalign.core import CPS, Loss, Phase, Progress, StandardizedSum, Streams, group_mean
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import ConstantReward, TinyPolicy, channel_reward
from diffalign.testing.slow import path_log_prob


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
