"""Moving windows of stochastic steps: where they stand, that they agree everywhere, and that they train."""

import attrs
import pytest
import torch

from diffalign import AlignmentLoop
from diffalign.core import Progress, Streams
from diffalign.objectives import FlowGRPO
from diffalign.prompts import Prompts
from diffalign.samplers import Plan, RandomWindow, SlidingWindow, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward


def places(plan, steps, step, seed=0):
    branching = plan.draw(steps, Progress(step, 1000), Streams(seed, step))
    return [place for place, eta in enumerate(branching.noise_levels) if eta > 0], branching


def test_the_window_slides_and_begins_again():
    plan = SlidingWindow(width=2, samples=3, every=5, stride=2, first=1)
    seen = [places(plan, 8, step)[0] for step in range(0, 25, 5)]
    assert seen == [[1, 2], [3, 4], [5, 6], [1, 2], [3, 4]]
    assert places(plan, 8, 4)[0] == [1, 2]
    assert plan.largest_noise(8) == (0.0, *[0.7] * 6, 0.0)
    assert SlidingWindow(width=1, stride=3).largest_noise(8) == (0.0, 0.7, 0.0, 0.0, 0.7, 0.0, 0.0, 0.0)


def test_the_papers_window_of_25_steps_reaches_the_last_but_one():
    plan = SlidingWindow()
    starts = [places(plan, 25, step)[0][0] for step in range(0, 25 * 21, 25)]
    assert starts == [*range(1, 21), 1]
    assert places(plan, 25, 25 * 19)[0] == [20, 21, 22, 23]


def test_samples_part_where_the_window_begins_or_have_a_noise_each():
    _, shared = places(SlidingWindow(width=2, samples=3), 8, 0)
    assert (shared.roots, shared.leaves, shared.children) == (1, 3, (1, 3, 1, 1, 1, 1, 1, 1))
    assert shared.rollout_rows == 1 + 1 + 6 * 3
    _, apart = places(SlidingWindow(width=2, samples=3, shared_noise=False), 8, 0)
    assert (apart.roots, apart.leaves, apart.rollout_rows, apart.replay_rows) == (3, 3, 24, 6)


def test_a_random_window_is_drawn_by_the_step_and_stands_everywhere():
    plan = RandomWindow(width=2, samples=3)
    seen = [places(plan, 7, step)[0][0] for step in range(80)]
    assert set(seen) == {1, 2, 3, 4}
    assert plan.largest_noise(7) == (0.0, *[0.7] * 5, 0.0)
    assert seen == [places(plan, 7, step)[0][0] for step in range(80)]
    assert seen != [places(plan, 7, step, seed=1)[0][0] for step in range(80)]


@pytest.mark.parametrize("plan", [SlidingWindow(2, 3, every=1), RandomWindow(2, 3), RandomWindow(2, 3, shared_noise=False)])
def test_a_forecast_has_the_rows_of_the_widest_draw_of_the_run(plan):
    sampler = TreeSampler(9, plan)
    drawn = [sampler.branching(Progress(step, 80), Streams(0, step)) for step in range(80)]
    assert sampler.branching().rollout_rows == max(branching.rollout_rows for branching in drawn)


@attrs.define
class Counting(Plan):
    """Remembers how often it was drawn."""

    draws: int = 0

    def draw(self, steps, progress, streams):
        self.draws += 1
        return SlidingWindow(2, 3).draw(steps, progress, streams)

    def state(self):
        return {"draws": self.draws}

    def restore(self, state):
        self.draws = state["draws"]


def test_a_forecast_moves_no_state_of_a_plan():
    sampler = TreeSampler(8, Counting())
    sampler.branching()
    sampler.outline(TinyPolicy())
    assert sampler.plan.draws == 0
    sampler.branching(Progress(0, 1), Streams(0))
    assert sampler.plan.draws == 1


@pytest.mark.parametrize("plan", [SlidingWindow(width=4), RandomWindow(width=4)])
def test_a_window_that_does_not_fit_is_refused(plan):
    TreeSampler(6, plan)
    with pytest.raises(ValueError, match=r"Window must fit 5 steps: 4 stochastic steps from step 1 on, .* need at least 6"):
        TreeSampler(5, plan)


@pytest.mark.parametrize("plan", [SlidingWindow(2, 3, every=1), RandomWindow(2, 3), RandomWindow(2, 3, shared_noise=False)])
def test_a_run_of_them_moves_the_weights_and_keeps_the_contract(plan):
    policy = TinyPolicy()
    loop = AlignmentLoop(FlowGRPO(policy, kl=0.0), TreeSampler(6, plan), channel_reward, Prompts(["a", "b"]), prompts_per_step=2)
    before = torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])
    reports = []
    for step in range(3):
        reports.append(loop.step(loop.prompts.draw(step, 2), Progress(step, 3)))
    after = torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])
    assert float((after - before).abs().max()) > 0
    assert all(report.metrics["contract/deviation"] == 0 for report in reports)
    assert all(len(report.batch.rewards) == 6 for report in reports)
