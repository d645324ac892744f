"""The loop: what is undone when a step fails."""

import pytest
import torch
from loops import PROMPTS, Phased, build, phase, same, square, weights

from diffalign.core import Loss, NonFiniteError, Phase, Progress, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.testing import TinyPolicy


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
