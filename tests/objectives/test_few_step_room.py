"""Few-step settings that leave a stage no noise level: refused before the first draw, for every grid of the run."""

import itertools
import re

import pytest
import torch
from few_step_cases import GRID, PROMPTS, batch_of, moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import Streams
from diffalign.objectives import DirectReinforcement, SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives.few_step import (
    CleanerStages,
    EveryStage,
    FinalStage,
    FixedTime,
    LogitNormalTime,
    Overlap,
    Separate,
    ShiftedTime,
    StageSampler,
    UniformStages,
)
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.stages import Rows
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, DrawnSteps
from diffalign.testing import TinyPolicy, channel_reward

TIMES = [ShiftedTime(), ShiftedTime(1.0, 0.3), LogitNormalTime(), FixedTime(0.6), FixedTime(0.95)]
FOUR = DeterministicSampler(4, samples=2)
WITHOUT_ROOM = {"reward_interval": Separate(), "reward_floor": 0.0, "surrogate_floor": 0.6}


def of_several_numbers(middle=0.75):
    """A student of 4 and 2 steps, on grids of their own."""
    return TDMPolicy(TinyPolicy((2, 2), dtype=torch.float64), steps=4, also=[2], grid=[GRID, [1.0, middle, 0.0]], tag=" in {steps} steps")


def built(objective, sampler=FOUR):
    return AlignmentLoop(objective, sampler, channel_reward, Prompts(PROMPTS), prompts_per_step=1)


@pytest.mark.parametrize("times", TIMES, ids=repr)
@pytest.mark.parametrize("interval", [Overlap(), Separate()], ids=repr)
def test_a_stage_is_refused_beforehand_exactly_where_its_draw_would_be(times, interval):
    trajectories, refused = batch_of(tiny_student(), samples=2).trajectories, []
    for stage, floor, ceiling in itertools.product(range(4), (0.0, 0.55, 0.9), (0.7, 1.0)):
        queries = Queries(interval, times, floor, "sample", ceiling=ceiling)
        try:
            taus, _ = queries(Rows.of(trajectories, [stage]), Streams(0), "q")
        except ValueError as error:
            refused.append(stage)
            where = f"Mine finds no noise level for stage {stage} of 4, from sigma {GRID[stage]:g} to {GRID[stage + 1]:g}: "
            with pytest.raises(ValueError, match=re.escape(where + str(error))):
                queries.require(trajectories.sigmas, [stage], "Mine")
        else:
            queries.require(trajectories.sigmas, [stage], "Mine")
            assert (taus > max(floor, GRID[stage + 1])).all()
    assert 0 < len(refused) < 24


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (ShiftedTime(), "between sigma 0.3372 (0.3 and a margin of 0.02 before the shift) and sigma 0.25, where there is nothing"),
        (LogitNormalTime(), "between sigma 0.32 (0.3 and a margin of 0.02) and sigma 0.25, where there is nothing"),
        (FixedTime(0.95), "in the stage's interval (0.3, 0.25]; got 0.95"),
    ],
    ids=repr,
)
def test_the_message_names_the_sigmas_of_one_stage(times, said):
    low, high = torch.tensor([[0.9, 0.3], [1.0, 0.25]], dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape(said)):
        times(low, high, torch.zeros(2, dtype=torch.float64))


def test_stages_that_are_seldom_drawn_are_refused_when_a_run_is_built():
    said = r"SurrogateReward's surrogate finds no noise level for stage 3 of 4, from sigma 0.5 to 0: query times must lie between sigma "
    for sampler in (UniformStages(1), CleanerStages(1)):
        with pytest.raises(ValueError, match=said + re.escape("0.6211 (0.6 and a margin of 0.02 before the shift) and sigma 0.5")):
            built(SurrogateReward(tiny_student(), surrogate_stages=sampler, **WITHOUT_ROOM))
    with pytest.raises(ValueError, match="SurrogateReward's reward term finds no noise level for stage 3 of 4"):
        built(SurrogateReward(tiny_student(), reward_interval=Separate(), reward_floor=0.6, surrogate_floor=0.0))
    with pytest.raises(ValueError, match=r"SurrogateReward finds no noise level for stage 0 of 4, from sigma 1 to 0\.9"):
        built(SurrogateReward(tiny_student(), interval=Separate(), times=ShiftedTime(margin=0.26)))


def test_stages_that_are_never_drawn_or_never_reached_need_no_room():
    times = FixedTime(0.4)  # below the ends of all stages but the last
    built(SurrogateReward(tiny_student(), times=times, surrogate_floor=0.3, stages=FinalStage(), surrogate_stages=FinalStage()))
    built(TrajectoryDistributionMatching(tiny_student(), times=times, stages=FinalStage()))
    near = {"reward_interval": Separate(), "reward_floor": 0.6, "surrogate_floor": 0.0}
    built(SurrogateReward(tiny_student(), reward_stages=3, **near))
    built(SurrogateReward(tiny_student(), reward_ceiling=0.7, reward_floor=0.6, surrogate_floor=0.6))


class FirstStages(StageSampler):
    """A sampler of a user's own: never the last stage."""

    def draw(self, stages, generator):
        return tuple(range(stages - 1))


class ToldFirstStages(StageSampler):
    """The same, and it says so."""

    def draw(self, stages, generator):
        return tuple(range(stages - 1))

    def possible(self, stages):
        return tuple(range(stages - 1))


@pytest.mark.parametrize("sampler", [FirstStages(), ToldFirstStages()])
def test_a_stage_sampler_of_ones_own_is_not_held_to_stages_that_it_does_not_draw(sampler):
    with pytest.raises(ValueError, match="stage 3 of 4"):
        built(SurrogateReward(tiny_student(), surrogate_stages=EveryStage(), **WITHOUT_ROOM))
    built(SurrogateReward(tiny_student(), surrogate_stages=sampler, **WITHOUT_ROOM)).run(1)


def test_samplers_draw_the_stages_that_they_say():
    for sampler in (EveryStage(), UniformStages(1), CleanerStages(1), FinalStage(2)):
        drawn = {stage for seed in range(200) for stage in sampler.draw(4, Streams(seed).generator("s"))}
        assert drawn == set(sampler.possible(4))


def test_every_number_of_steps_is_asked_when_a_run_is_built():
    sampler = DrawnSteps([4, 2], samples=2)
    for weights, stages in (([1, 1, 0.5, 0.5], 2), ([1, 0.5], 4)):
        said = rf"reward_weights must have a number for each of the {stages} stages; got {len(weights)}\. Write as many, or leave it out"
        with pytest.raises(ValueError, match=said):
            built(SurrogateReward(of_several_numbers(), reward_weights=weights), sampler)
    built(SurrogateReward(of_several_numbers(), reward_weights=[1, 1, 0.5, 0.5]), DrawnSteps([4], samples=2)).run(1)
    for objective in (TrajectoryDistributionMatching, DirectReinforcement):
        with pytest.raises(ValueError, match=r"Matching finds no noise level for stage 0 of 2, from sigma 1 to 0\.995"):
            built(objective(of_several_numbers(0.995)), sampler)
        built(objective(of_several_numbers(0.995)), DrawnSteps([4], samples=2)).run(1)


@pytest.mark.parametrize("stages", [EveryStage(), FinalStage()], ids=repr)
@pytest.mark.parametrize("interval", [Overlap(), Separate()], ids=repr)
@pytest.mark.parametrize("times", [ShiftedTime(), LogitNormalTime(), FixedTime(0.95), FixedTime(0.45)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=repr)
def test_random_ends_leave_room_for_the_query_times(times, interval, stages, dtype):
    student = moved(tiny_student(dtype))
    objective = TrajectoryDistributionMatching(student, random_end=1e-6, times=times, interval=interval, stages=stages)
    batch = batch_of(student, samples=2, prompts=PROMPTS[:1])
    try:
        objective.require(FOUR.outline(student))
    except ValueError:
        assert isinstance(times, FixedTime)  # one sigma lies in one stage alone, or above the ends of all
        return
    ends = []
    for update in range(200):
        rows = objective._rows(batch, update)
        taus, _ = objective._queries(rows, batch.streams, f"fake/{update}")
        assert (rows.sigma_end >= batch.trajectories.sigmas[rows.stage + 1]).all()
        assert (taus > rows.sigma_end).all()
        ends.append(rows.sigma_end[0].item())
    assert len(set(ends)) > 50  # most are where they were drawn


def test_random_ends_that_leave_room_are_where_they_were_drawn():
    student = moved(tiny_student())
    batch = batch_of(student, samples=2)
    for update in range(20):
        wide = TrajectoryDistributionMatching(student, random_end=0.02)._rows(batch, update)
        free = TrajectoryDistributionMatching(student, random_end=0.02, times=ShiftedTime(margin=1e-3))._rows(batch, update)
        assert torch.equal(wide.sigma_end, free.sigma_end)
