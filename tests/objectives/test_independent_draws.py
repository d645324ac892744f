"""TDM-R1 with more signal from the same samples: draws by prompt and by sample, weights by stage, bounds of tau; and other advantages."""

import pytest
import torch
from few_step_cases import PROMPTS, assert_same_gradients, batch_of, flat, gradients, moved, tiny_student

from diffalign.core import Delayed, Progress
from diffalign.objectives import DGPO, SurrogateReward
from diffalign.objectives.few_step import (
    CleanerStages,
    EveryStage,
    ExtremesAdvantage,
    FinalStage,
    GroupAdvantage,
    Separate,
    SignAdvantage,
    UniformStages,
    WeightedMix,
)
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.stages import Rows


def reinforced(student, **options):
    settings = {"mix": WeightedMix(reward=1.0, guidance=0.0, kl=0.0), "surrogate_stages": FinalStage(1)}
    objective = SurrogateReward(student, **(settings | options))
    moved(objective.fake, 0.1)
    moved(objective.surrogate, -0.05)
    return objective


def recorded(policy, monkeypatch):
    """Latents, sigmas and prompts of every call from now on, one row each."""
    calls, velocity = [], policy.velocity

    def watched(latents, sigma, condition):
        calls.append((latents.detach().clone(), sigma.detach().clone(), condition.prompts))
        return velocity(latents, sigma, condition)

    monkeypatch.setattr(policy, "velocity", watched)
    return calls


def test_every_prompt_draws_stages_of_its_own_and_does_not_know_the_others():
    student = moved(tiny_student())
    many = PROMPTS * 4
    objective = reinforced(student, stages=UniformStages(1), stages_by="prompt")
    rows = objective._rows(batch_of(student, prompts=many), objective.stages, "few_step/0/stages")
    drawn = {prompt: set(rows.stage[rows.prompt == prompt].tolist()) for prompt in range(len(many))}
    assert all(len(stages) == 1 for stages in drawn.values())
    assert len(set().union(*drawn.values())) > 2
    alone = objective._rows(batch_of(student, prompts=[many[5]], ids=[5]), objective.stages, "few_step/0/stages")
    assert set(alone.stage.tolist()) == drawn[5]
    together = reinforced(student, stages=UniformStages(1))
    assert len(together._rows(batch_of(student, prompts=many), objective.stages, "few_step/0/stages").stage.unique()) == 1


def test_rows_by_prompt_are_those_of_each_prompts_stages():
    batch = batch_of(moved(tiny_student()))
    rows = Rows.by_prompt(batch.trajectories, [(0, 2), (1, 1), (3, 0)])
    for prompt, stages in enumerate([(0, 2), (1, 1), (3, 0)]):
        for draw, stage in enumerate(stages):
            mine = (rows.prompt == prompt) & (rows.draw == draw)
            alone = Rows.of(batch.trajectories, (stage,))
            assert torch.equal(rows.end[mine], alone.end[alone.prompt == prompt])
    assert float(rows.share.sum()) == pytest.approx(len(PROMPTS))


def test_a_step_whose_prompts_draw_alike_has_the_same_gradient():
    student = moved(tiny_student())
    batch = batch_of(student)
    by_prompt = gradients(reinforced(student, stages=EveryStage(), surrogate_stages=EveryStage(), stages_by="prompt"), batch)
    assert_same_gradients(by_prompt, gradients(reinforced(student, stages=EveryStage(), surrogate_stages=EveryStage()), batch), tolerance=0)


@pytest.mark.parametrize("noise", ["group", "sample"])
def test_the_rewards_noise_is_the_groups_or_each_samples_and_the_surrogates_is_the_groups(noise, monkeypatch):
    student = moved(tiny_student())
    objective = reinforced(student, stages=FinalStage(1), reward_noise=noise)
    batch = batch_of(student)
    calls = recorded(objective.surrogate, monkeypatch)
    gradients(objective, batch)
    clean = batch.trajectories.samples
    apart = []
    for latents, sigma, _ in calls:  # x_tau = (1 - tau) x + tau e: the noise is what is left
        wide = sigma.reshape(-1, *(1,) * (clean.ndim - 1))
        noises = (latents - (1 - wide) * clean) / wide
        apart.append(float((noises[0] - noises[1]).abs().max()) > 1e-6)
    assert apart == [False, noise == "sample"]  # its own training, then the generator's question


def test_weights_by_stage_scale_the_reward_term():
    student = moved(tiny_student())
    batch = batch_of(student)

    def of(weights=None):
        return flat(gradients(reinforced(student, stages=EveryStage(), reward_weights=weights), batch)["generator"])

    parts = [of([float(stage == other) for other in range(4)]) for stage in range(4)]
    assert all(float(part.norm()) > 1e-6 for part in parts)
    torch.testing.assert_close(of((0.0, 1.0, 3.0, 0.5)), parts[1] + 3 * parts[2] + parts[3] / 2, rtol=1e-9, atol=1e-12)
    assert torch.equal(of((1.0,) * 4), of())
    with pytest.raises(ValueError, match=r"reward_weights must have a number for each of the 4 stages; got 2"):
        of((1.0, 2.0))
    with pytest.raises(ValueError, match="reward_weights must be a number of at least 0 for each stage"):
        of((1.0, -1.0, 0.0, 0.0))


def test_nothing_is_asked_above_a_ceiling_and_stages_that_end_there_are_left_out(monkeypatch):
    student = moved(tiny_student())  # levels 1, 0.9, 0.75, 0.5, 0
    objective = reinforced(student, reward_ceiling=0.8, surrogate_ceiling=0.7)
    calls = recorded(objective.surrogate, monkeypatch)
    gradients(objective, batch_of(student))
    (_, own, _), (_, asked, _) = calls
    assert float(own.max()) <= 0.7
    assert float(asked.max()) <= 0.8
    assert len(asked) == 3 * len(PROMPTS) * 4  # of four stages the first ends at 0.9
    with pytest.raises(ValueError, match=r"reward_ceiling must lie in \(0, 1\]"):
        reinforced(student, reward_ceiling=1.5)
    with pytest.raises(ValueError, match="a higher ceiling"):
        gradients(reinforced(student, surrogate_ceiling=0.3), batch_of(student))


def test_what_is_left_out_changes_no_draw():
    batch = batch_of(moved(tiny_student()))
    rows = Rows.of(batch.trajectories, (1, 2, 3))
    queries = Queries(Separate(), reinforced(tiny_student()).times, shared="sample")
    tau, noise = queries(rows, batch.streams, "q")
    index = (rows.stage < 3).nonzero().squeeze(1)
    assert all(
        torch.equal(some, whole[index]) for some, whole in zip(queries(rows.select(index), batch.streams, "q"), (tau, noise), strict=True)
    )


REWARDS, GROUP = torch.tensor([0.0, 1.0, 5.0, 2.0, 2.0, 2.0, 3.0, 3.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])


def test_signs_and_extremes():
    third = 1 / 3
    # means 2, 2 (no spread), 7/3: signs -1, -1, 1 and 1, 1, -1
    assert SignAdvantage()(REWARDS, GROUP).tolist() == pytest.approx(
        [-2 * third, -2 * third, 4 * third, 0, 0, 0, 2 * third, 2 * third, -4 * third]
    )
    assert ExtremesAdvantage()(REWARDS, GROUP).tolist() == [-1, 0, 1, 0, 0, 0, 0.5, 0.5, -1]


@pytest.mark.parametrize("rule", [SignAdvantage(), ExtremesAdvantage(), GroupAdvantage("none", bound=None)], ids=repr)
def test_advantages_of_a_group_sum_to_zero(rule):
    sums = torch.zeros(3, dtype=torch.float64).scatter_add(0, GROUP, rule(REWARDS, GROUP))
    torch.testing.assert_close(sums, torch.zeros_like(sums))


@pytest.mark.parametrize("rule", [SignAdvantage(), ExtremesAdvantage()], ids=repr)
def test_they_teach_a_surrogate(rule):
    student = moved(tiny_student())
    plain = flat(gradients(reinforced(student), batch_of(student))["surrogate"])
    other = flat(gradients(reinforced(student, advantage=rule), batch_of(student))["surrogate"])
    assert torch.nn.functional.cosine_similarity(plain, other, dim=0) > 0.5
    assert not torch.equal(plain, other)


def test_dgpo_rolls_out_by_an_average_after_some_steps():
    student = moved(tiny_student())
    objective = DGPO(student, rollouts="old", clip=None, decay=Delayed(0.0, 0.5, steps=1))
    assert objective.behavior() is objective.old
    assert objective.policies()["old"] is objective.old
    weights = []
    for step in range(2):
        gradients(objective, batch_of(student, step=step))
        moved(student, 1.0)
        objective.after_step()
        weights.append([policy.policy.network.lora_B.weight.detach().clone() for policy in (student, objective.old)])
    assert torch.equal(*weights[0])
    torch.testing.assert_close(weights[1][1], weights[1][0] - 0.5)
    assert DGPO(student).behavior() is student


def test_a_delayed_number():
    assert [Delayed(0.1, 0.3, steps=2)(Progress(step, 5)) for step in range(4)] == [0.1, 0.1, 0.3, 0.3]


def test_cleaner_stages_by_prompt_keep_their_law():
    student = moved(tiny_student())
    objective = reinforced(student, surrogate_stages=CleanerStages(1), stages_by="prompt")
    rows = objective._rows(batch_of(student, samples=2, prompts=PROMPTS * 30), objective.surrogate_stages, "surrogate/0/stages")
    shares = torch.bincount(rows.stage, minlength=4) / len(rows)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.15, rtol=0)
