"""TDM-R1: at which noise levels each role is asked, where distillation and reward look at different ones."""

import pytest
import torch
from few_step_cases import batch_of, moved, tiny_student

from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import EveryStage, Overlap, Separate, WeightedMix


def asked(policy, name, monkeypatch):
    """Every sigma at which a policy is asked from now on."""
    sigmas, velocity = [], policy.velocity

    def recorded(latents, sigma, condition):
        sigmas.append(sigma.detach().clone())
        return velocity(latents, sigma, condition)

    monkeypatch.setattr(policy, "velocity", recorded)
    return sigmas


@pytest.mark.parametrize("interval", [Separate(), Overlap()], ids=repr)
def test_the_reward_is_asked_above_its_floor_while_the_fake_keeps_to_the_stages(interval, monkeypatch):
    objective = SurrogateReward(
        moved(tiny_student()),
        interval=interval,
        reward_floor=0.6,
        surrogate_floor=0.6,
        stages=EveryStage(),
        surrogate_stages=EveryStage(),
        mix=WeightedMix(),
        shared="group",
    )
    batch = batch_of(objective.policy)
    by_role = {role: asked(policy, role, monkeypatch) for role, policy in (("fake", objective.fake), ("surrogate", objective.surrogate))}
    for phase in objective.phases():
        for loss in phase.losses(batch, 0):
            assert bool(loss.value.isfinite())
    of_surrogate, of_fake = torch.cat(by_role["surrogate"]), torch.cat(by_role["fake"])
    assert float(of_surrogate.min()) >= 0.6
    levels = batch.trajectories.sigmas
    stages = len(levels) - 1
    rows = of_fake.view(2, stages, -1)  # its own loss, then the generator's, stage after stage
    inside = (rows > levels[1:, None]) & (rows < levels[:-1, None])
    assert bool(inside.all()) == isinstance(interval, Separate)


def test_a_floor_above_a_stage_needs_the_interval_that_reaches_it():
    objective = SurrogateReward(
        moved(tiny_student()), reward_interval=Separate(), surrogate_floor=0.6, reward_floor=0.6, surrogate_stages=EveryStage()
    )
    batch, (phase,) = batch_of(objective.policy), objective.phases()
    with pytest.raises(ValueError, match=r"Lower the floor or the margin, or take the interval Overlap"):
        list(phase.losses(batch, 0))
