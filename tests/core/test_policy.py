"""Policies, their forks, and guidance as a wrapper."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import CPS, Condition, Euler, Guided, Policy, require_frozen
from diffalign.testing import TinyPolicy

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("a red cube")]


def inputs(policy, seed=0):
    """Latents, sigmas and one condition per row."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, *policy.latent_shape, generator=generator).to(policy.dtype)
    return latents, torch.tensor([0.9, 0.5, 0.2], dtype=policy.dtype), policy.encode(PROMPTS)


def velocity(policy, of=None):
    with torch.no_grad():
        return policy.velocity(*inputs(of or policy))


def train(policy, steps=3):
    """Move a trainable policy."""
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.velocity(*inputs(policy)).square().sum().backward()
        optimizer.step()


class Still(Policy):
    """A policy without parameters: velocity 0."""

    def encode(self, prompts):
        return Condition(tuple(prompts), torch.arange(len(prompts)), {})

    def decode(self, latents):
        return latents[:, :, None, None]

    def prior(self, noise):
        return noise

    def sigmas(self, steps):
        return torch.linspace(1, 0, steps + 1)

    def velocity(self, latents, sigma, condition):
        return torch.zeros_like(latents)

    def fork(self, *, trainable=False, pristine=False):
        return type(self)(self.kernel, self.latent_shape)


def test_an_incomplete_policy_cannot_be_built():
    class Half(Policy):
        def encode(self, prompts): ...

    with pytest.raises(TypeError, match="abstract"):
        Half(Euler(), (2,))


def test_a_policy_without_parameters_lives_on_the_cpu():
    policy = Still(Euler(), [2, 3])
    assert policy.device == torch.device("cpu")
    assert policy.latent_shape == (2, 3)
    assert policy.trainable_parameters() == {}
    assert policy.own_parameters() == {}
    assert TinyPolicy().device == torch.device("cpu")


def test_a_transition_is_the_kernel_at_the_velocity():
    policy = TinyPolicy((2, 2), kernel=CPS("sum"))
    latents, sigma, condition = inputs(policy)
    sigma_next, eta = sigma / 2, torch.tensor([0.7, 0.0, 1.0])
    got = policy.transition(latents, sigma, sigma_next, condition, eta)
    expected = CPS("sum").step(latents, policy.velocity(latents, sigma, condition), sigma, sigma_next, eta)
    assert torch.equal(got.mean, expected.mean)
    assert torch.equal(got.std, expected.std)
    assert got.density == "sum"


def test_the_clean_prediction_extrapolates_the_velocity_to_sigma_0():
    policy = TinyPolicy((2, 2))
    latents, sigma, condition = inputs(policy)
    expected = latents - sigma[:, None, None] * policy.velocity(latents, sigma, condition)
    assert torch.equal(policy.predict_clean(latents, sigma, condition), expected)


def test_rows_and_calls_are_counted():
    policy = TinyPolicy()
    velocity(policy)
    velocity(policy)
    assert (policy.counter.rows, policy.counter.calls) == (6, 2)
    assert (policy.fork().counter.rows, policy.fork().counter.calls) == (0, 0)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_fork_starts_equal_and_shares_what_is_frozen(trainable):
    policy = TinyPolicy()
    twin = policy.fork(trainable=trainable)
    assert torch.equal(velocity(twin), velocity(policy))
    mine, theirs = dict(policy.named_parameters()), dict(twin.named_parameters())
    shared = {name for name in mine if mine[name] is theirs[name]}
    assert shared == {name for name in mine if "body" in name}
    assert twin.trainable_parameters().keys() == (policy.trainable_parameters().keys() if trainable else set())


def test_moving_one_fork_never_moves_another():
    policy = TinyPolicy()
    first = policy.fork(trainable=True)
    second = first.fork(trainable=True)
    start = velocity(policy)
    train(first)
    moved = velocity(first)
    assert not torch.equal(moved, start)
    assert torch.equal(velocity(policy), start)
    assert torch.equal(velocity(second), start)
    train(second, steps=5)
    train(policy, steps=1)
    assert torch.equal(velocity(first), moved)


def test_a_fork_of_a_moved_fork_starts_where_that_one_is():
    first = TinyPolicy().fork(trainable=True)
    train(first)
    assert torch.equal(velocity(first.fork()), velocity(first))


def test_a_pristine_fork_leaves_the_delta_out_wherever_it_is_taken():
    bare, policy = TinyPolicy(delta=0.0), TinyPolicy(delta=0.5)
    assert not torch.equal(velocity(policy), velocity(bare))
    assert torch.equal(velocity(policy.fork(pristine=True)), velocity(bare))
    trained = policy.fork(trainable=True)
    train(trained)
    pristine = trained.fork(trainable=True, pristine=True)
    assert torch.equal(velocity(pristine), velocity(bare))
    assert pristine.trainable_parameters().keys() == policy.trainable_parameters().keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_of_two_forks_interleave(checkpointing):
    policy = TinyPolicy(checkpointing=checkpointing)
    other = policy.fork(trainable=True)
    train(other)

    def gradients(*order):
        for each in (policy, other):
            each.zero_grad(set_to_none=True)
        losses = [each.velocity(*inputs(each)).square().sum() for each in order]
        for loss in losses:
            loss.backward()
        return [{name: p.grad.clone() for name, p in each.trainable_parameters().items()} for each in order]

    alone = gradients(policy)[0], gradients(other)[0]
    for expected, got in zip(alone, gradients(policy, other), strict=True):
        assert expected.keys() == got.keys() == {"network.lora_A.weight", "network.lora_B.weight"}
        for name, gradient in expected.items():
            assert torch.equal(gradient, got[name])


def test_lerp_moves_by_its_weight_and_leaves_shared_tensors():
    policy = TinyPolicy()
    other = policy.fork(trainable=True)
    train(other)
    body = policy.network.body[0].weight.clone()
    start = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    policy.lerp_(other, 0.25)
    for name, parameter in policy.trainable_parameters().items():
        expected = start[name] + 0.25 * (dict(other.named_parameters())[name].detach() - start[name])
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(policy.network.body[0].weight, body)
    assert policy.network.body[0].weight is other.network.body[0].weight


def test_lerp_by_1_copies_and_by_0_does_nothing():
    policy = TinyPolicy()
    other = policy.fork(trainable=True)
    train(other)
    start, goal = velocity(policy), velocity(other)
    policy.lerp_(other, 0.0)
    assert torch.equal(velocity(policy), start)
    policy.lerp_(other, 1.0)
    assert torch.equal(velocity(policy), goal)
    assert torch.equal(velocity(other), goal)


def test_lerp_refuses_a_stranger():
    with pytest.raises(
        ValueError, match=r"lerp_ needs a fork of the same policy; 6 parameters differ in name \(first: 'network.body.0.bias'\)"
    ):
        TinyPolicy().lerp_(Still(Euler(), (2,)), 1.0)


@pytest.mark.parametrize(
    ("verb", "act"),
    [
        ("requires_grad_", lambda policy: policy.requires_grad_(False)),
        ("to", lambda policy: policy.to(torch.float64)),
        ("to", lambda policy: policy.double()),
        ("to", lambda policy: policy.to("meta")),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_would_move_every_fork_is_refused_on_all_of_them(verb, act, wrapped):
    policy = TinyPolicy()
    if wrapped:
        policy = Guided(policy, 2.0)
    act(TinyPolicy() if not wrapped else Guided(TinyPolicy(), 2.0))  # before the first fork it is allowed
    twin = policy.fork()
    for each in (policy, twin):
        with pytest.raises(RuntimeError, match=rf"\.{verb}\(\) would change every fork, because forks share tensors"):
            act(each)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in twin.parameters())
    assert any(p.requires_grad for p in policy.parameters())


def test_a_reference_that_could_move_is_refused_with_the_remedy():
    policy = TinyPolicy()
    with pytest.raises(
        ValueError,
        match=r"reference must be frozen: 2 parameters require grad \(first: 'network.lora_A.weight'\). Build it with policy.fork\(\).",
    ):
        require_frozen(policy, "reference")
    require_frozen(policy.fork(), "reference")


def test_guidance_extrapolates_from_the_negative_prompt_at_two_rows_a_sample():
    policy = TinyPolicy()
    guided = Guided(policy, 3.0, negative="blurry")
    latents, sigma, condition = inputs(policy)
    positive = policy.velocity(latents, sigma, condition)
    negative = policy.velocity(latents, sigma, policy.encode([Prompt("blurry")] * 3))
    rows = policy.counter.rows
    torch.testing.assert_close(guided.velocity(latents, sigma, condition), negative + 3.0 * (positive - negative))
    assert guided.counter is policy.counter
    assert policy.counter.rows - rows == 6


def test_guidance_of_scale_1_is_none_and_costs_nothing():
    policy = TinyPolicy(dtype=torch.float64)
    assert policy.no_guidance == 1.0
    latents, sigma, condition = inputs(policy)
    positive = policy.velocity(latents, sigma, condition)
    rows = policy.counter.rows
    assert torch.equal(Guided(policy, 1.0).velocity(latents, sigma, condition), positive)
    assert policy.counter.rows - rows == len(latents)
    torch.testing.assert_close(policy.guide(positive, 2 * positive, 1.0), positive, rtol=1e-12, atol=1e-12)


def test_guidance_follows_the_rule_of_the_policy_below():
    class Additive(TinyPolicy):  # Z-Image's rule
        no_guidance = 0.0

        def guide(self, positive, negative, scale):
            return positive + scale * (positive - negative)

    policy = Additive()
    latents, sigma, condition = inputs(policy)
    expected = policy.guide(
        policy.velocity(latents, sigma, condition), policy.velocity(latents, sigma, policy.encode([Prompt("")] * 3)), 2.0
    )
    twice = Guided(Guided(policy, 2.0), 1.0)
    assert torch.equal(Guided(policy, 2.0).velocity(latents, sigma, condition), expected)
    plain = policy.velocity(latents, sigma, condition)
    assert torch.equal(Guided(policy, 0.0).velocity(latents, sigma, condition), plain)
    assert not torch.allclose(Guided(policy, 1.0).velocity(latents, sigma, condition), plain)
    assert torch.equal(twice.guide(latents, -latents, 2.0), policy.guide(latents, -latents, 2.0))


def test_a_guided_policy_is_otherwise_the_policy_below():
    policy = TinyPolicy()
    guided = Guided(policy, 2.0)
    latents = inputs(policy)[0]
    assert torch.equal(guided.decode(latents), policy.decode(latents))
    assert torch.equal(guided.prior(latents), policy.prior(latents))
    assert torch.equal(guided.sigmas(5), policy.sigmas(5))
    assert torch.equal(guided.encode(PROMPTS).tensors["embedding"], policy.encode(PROMPTS).tensors["embedding"])
    assert guided.own_parameters().items() == dict(guided.named_parameters()).items()


def test_a_fork_of_a_guided_policy_is_guided_alike_and_apart():
    guided = Guided(TinyPolicy(), 2.0, negative="blurry")
    twin = guided.fork(trainable=True)
    start = velocity(guided, of=guided.policy)
    assert torch.equal(velocity(twin, of=guided.policy), start)
    with torch.no_grad():
        twin.policy.network.lora_B.weight.add_(1.0)
    assert not torch.equal(velocity(twin, of=guided.policy), start)
    assert torch.equal(velocity(guided, of=guided.policy), start)
    assert twin.counter is not guided.counter
