"""Plans whose splits move: every draw has the promised leaves, stays inside the grid, and agrees with the release where that is right."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import CPS, FlowSDE, Progress, Streams
from diffalign.samplers import AdaptivePlan, ProgressPlan, TreeSampler
from diffalign.testing import TinyPolicy

DRAWS = 12
"""Draws of each plan that hypothesis makes up."""


def splits_of(branching):
    """Stochastic steps, as they were before a first one became roots."""
    return [step for step, eta in enumerate(branching.noise_levels) if eta > 0]


@st.composite
def places(draw):
    """What both moving plans take, the number of splits and of steps."""
    count = draw(st.integers(1, 4))
    gap, guard, first = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    steps = first + (count - 1) * gap + guard + 1 + draw(st.integers(0, 12))
    roots = draw(st.integers(1, 3))
    options = {
        "branches": draw(st.integers(2, 3)),
        "roots": roots,
        "levels": draw(st.none() | st.integers(0, count)),
        "max_leaves": draw(st.none() | st.integers(roots, 40)),
        "promote_roots": draw(st.booleans()) and count > 1,
        "tail_guard": guard,
        "min_gap": gap,
        "first": first,
        "concentration": draw(st.sampled_from([0.0, 1e-6, 0.5, 4.0, 6.0, 1e3])),
        "eta": draw(st.just(0.7) | st.lists(st.floats(0.1, 0.9), min_size=count, max_size=count)),
    }
    return count, steps, options


def promised(count, options):
    """Leaves of every draw: roots * branches^levels, under the cap."""
    levels = count if options["levels"] is None else options["levels"]
    while options["max_leaves"] is not None and options["roots"] * options["branches"] ** levels > options["max_leaves"]:
        levels -= 1
    return options["roots"] * options["branches"] ** levels, levels


def check_every_draw(plan, count, steps, options, progresses, seed):
    TreeSampler(steps, plan)
    leaves, levels = promised(count, options)
    most, widest = plan.largest_noise(steps), plan.largest(steps)
    for progress in progresses:
        streams = Streams(seed, progress.step)
        branching = plan.draw(steps, progress, streams)
        assert branching == plan.draw(steps, progress, Streams(seed, progress.step))  # its arguments alone
        assert branching.leaves == leaves
        assert len(branching.children) == steps
        assert all(eta <= limit for eta, limit in zip(branching.noise_levels, most, strict=True))
        assert all(width <= limit for width, limit in zip(branching.widths, widest.widths, strict=True))
        splits = splits_of(branching)
        promoted = options["promote_roots"] and branching.roots != options["roots"]
        assert len(splits) == count - promoted
        assert branching.roots == options["roots"] * (options["branches"] if promoted else 1)
        assert all(later - earlier >= options["min_gap"] for earlier, later in pairwise(splits))
        assert all(options["first"] <= split <= steps - 1 - options["tail_guard"] for split in splits)
        branches = [branching.children[split] > 1 for split in splits]
        assert branches == [index < levels - promoted for index in range(len(splits))]
        assert promoted or splits[0] > 1 or not (options["promote_roots"] and levels)


@given(places(), st.data())
def test_every_draw_of_a_progress_plan_has_the_promised_leaves(case, data):
    count, steps, options = case
    step = st.integers(0, steps - 1)
    early, late = (sorted(data.draw(st.lists(step, min_size=count, max_size=count))) for _ in range(2))
    plan = ProgressPlan(early, late, **options)
    numbers = data.draw(st.lists(st.integers(0, 99), min_size=DRAWS, max_size=DRAWS))
    check_every_draw(plan, count, steps, options, [Progress(number, 100) for number in numbers], data.draw(st.integers(0, 2**32)))


@given(places(), st.data())
def test_every_draw_of_an_adaptive_plan_has_the_promised_leaves(case, data):
    count, steps, options = case
    plan = AdaptivePlan(0.2, 0.6, count, **options)
    rewards = data.draw(st.lists(st.none() | st.floats(-1, 2), min_size=DRAWS, max_size=DRAWS))
    progresses = [Progress(number, 100, reward) for number, reward in enumerate(rewards)]
    check_every_draw(plan, count, steps, options, progresses, data.draw(st.integers(0, 2**32)))


@pytest.mark.parametrize(
    ("plan", "kernel", "message"),
    [
        (ProgressPlan((3, 4, 5), (1, 3, 5), first=0), FlowSDE(), "singular at sigma = 1"),
        (ProgressPlan((3, 4), (0, 4), first=0, concentration=0.0), FlowSDE(), "singular at sigma = 1"),
        (AdaptivePlan(0.0, 1.0, first=0), FlowSDE(), "singular at sigma = 1"),
        (AdaptivePlan(0.0, 1.0, eta=0.9, eta_factors=(1.3, 0.8), eta_max=1.5), CPS(), "at most 1 for CPS; step 1 is planned with 1.17"),
    ],
)
def test_what_a_later_draw_reaches_is_refused_before_the_run(plan, kernel, message):
    sampler = TreeSampler(8, plan)
    assert max(plan.largest_noise(8)) >= max(sampler.branching().noise_levels)
    with pytest.raises(ValueError, match=message):
        sampler.outline(TinyPolicy(kernel=kernel))


@pytest.mark.parametrize(
    "plan",
    [
        ProgressPlan((3, 4, 5), (1, 3, 5)),
        ProgressPlan((3, 4), (1, 4), first=0, concentration=0.0),
        ProgressPlan((1, 2, 3), (1, 3, 5), first=0, promote_roots=True),  # a split at step 0 becomes roots
        AdaptivePlan(0.0, 1.0, first=0, promote_roots=True, eta=0.9),
    ],
)
def test_what_no_draw_reaches_is_not_refused(plan):
    TreeSampler(8, plan).outline(TinyPolicy(kernel=FlowSDE()))


def test_a_plan_without_noise_has_none_and_one_whose_first_split_is_promoted_at_times_has_all():
    quiet = ProgressPlan((1, 2), (2, 3), levels=0, roots=3, eta=0.0, concentration=0.0)
    assert quiet.largest_noise(8) == (0.0,) * 8
    moving = ProgressPlan((1, 8, 8), (3, 4, 4), promote_roots=True, levels=1, max_leaves=4, concentration=0.0, eta=(0.3, 0.9, 0.9))
    for step in range(100):
        drawn = moving.draw(10, Progress(step, 100), Streams(0)).noise_levels
        assert all(eta <= most for eta, most in zip(drawn, moving.largest_noise(10), strict=True))


def test_the_shipped_setting_keeps_27_leaves_where_the_release_drops_to_9():
    plan = ProgressPlan((1, 2, 3), (1, 3, 5), promote_roots=True)
    draws = [plan.draw(6, Progress(step, 500), Streams(seed, step)) for step in range(500) for seed in range(4)]
    assert {branching.leaves for branching in draws} == {27}
    promoted = [branching for branching in draws if branching.roots == 3]
    assert len(promoted) > 0.99 * len(draws)  # as there
    assert {tuple(splits_of(branching)) for branching in promoted} == {(2, 3), (2, 4), (3, 4)}
    assert {tuple(splits_of(branching)) for branching in draws if branching.roots == 1} == {(2, 3, 4)}


REFUSED = "min gap pushes into the clip: duplicates"
OWN_GAP_BROKEN = {
    ("T=28 gap 5", step): "the push to the right is clipped, so the release breaks its own gap" for step in (450, 499, 500, 1000)
}


def test_progress_without_concentration_agrees_with_the_release(golden):
    ours = {}
    for row in golden["progress_schedule_kappa0"]:
        settings = row["kwargs"]
        steps, total = settings.get("num_inference_steps", 28), settings.get("total_train_steps", 500)
        plan = ProgressPlan(
            settings.get("early_splits", (4, 7, 12)),
            settings.get("late_splits", (6, 12, 20)),
            eta=settings.get("noise_levels", [0.8] * 3),
            tail_guard=row["effective_tail_guard"] - 1,  # theirs counts the step after the last split
            min_gap=settings.get("min_gap", 2),
            concentration=0.0,
        )
        if row["tag"] == REFUSED:  # three splits two apart need five steps, and there are four: the release gives [1, 3, 4]
            with pytest.raises(ValueError, match="ProgressPlan: 3 splits that are 2 apart need 5 steps, but only the steps 1 to 4 may"):
                TreeSampler(steps, plan)
            continue
        for point in row["schedule"]:
            branching = plan.draw(steps, Progress(point["step"], total + 1), Streams(0))
            ours[row["tag"], point["step"]] = splits_of(branching)
            if (row["tag"], point["step"]) in OWN_GAP_BROKEN:
                assert min(later - earlier for earlier, later in pairwise(point["splits"])) < settings["min_gap"]
                continue
            assert splits_of(branching) == point["splits"]
            assert [eta for eta in branching.noise_levels if eta] == point["noise_levels"]
    assert [ours[key] for key in OWN_GAP_BROKEN] == [[14, 19, 24]] * 4


def test_progress_moves_every_split_from_early_to_late():
    plan = ProgressPlan((1, 4, 8), (6, 12, 20), concentration=0.0)
    table = [splits_of(plan.draw(28, Progress(step, 50), Streams(0, step))) for step in range(50)]
    assert (table[0], table[-1]) == ([1, 4, 8], [6, 12, 20])
    for earlier, later in pairwise(table):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))


def test_concentration_is_spread_about_the_mean():
    def drawn(concentration):
        plan = ProgressPlan((9,), (9,), concentration=concentration)
        return torch.tensor([float(splits_of(plan.draw(20, Progress(0, 1), Streams(seed)))[0]) for seed in range(400)])

    loose, tight = drawn(4.0), drawn(100.0)
    assert abs(loose.mean() - 9) < 0.6
    assert abs(tight.mean() - 9) < 0.2
    share = (9 - 1) / (18 - 1)
    for values, concentration in ((loose, 4.0), (tight, 100.0)):
        expected = 17 * math.sqrt(share * (1 - share) / (concentration + 1))
        assert values.std() == pytest.approx(expected, rel=0.15)


def test_a_low_reward_splits_early_and_a_high_one_late():
    plan = AdaptivePlan(0.2, 0.6, concentration=4.0, tail_guard=3, min_gap=1, first=2)

    def means(reward):
        rows = [splits_of(plan.draw(28, Progress(1, 9, reward), Streams(seed))) for seed in range(300)]
        return torch.tensor(rows, dtype=torch.float64).mean(dim=0)

    low, middle, high = means(0.2), means(0.4), means(0.6)
    assert (middle - low > 2).all()
    assert (high - middle > 2).all()
    assert torch.equal(means(-5.0), low)  # outside the range counts as its end
    assert torch.equal(means(5.0), high)
    assert abs(low.mean() - (2 + 22 * 1 / 6)) < 0.7  # Beta(1, 5)
    assert abs(high.mean() - (2 + 22 * 5 / 6)) < 0.7


def test_the_deterministic_parts_of_the_adaptive_plan_agree_with_the_release(golden):
    row = golden["adaptive_schedule_deterministic_parts"]
    first = Progress(0, 100)
    assert splits_of(AdaptivePlan(0.2, 0.35).draw(28, first, Streams(0))) == row["default_splits_T28"]
    assert splits_of(AdaptivePlan(0.2, 0.35).draw(6, first, Streams(0))) == row["default_splits_T6"]
    plan = AdaptivePlan(0.2, 0.35, eta=(0.4, 0.7, 1.0), eta_factors=(1.3, 0.8))
    etas = [eta for eta in plan.draw(28, Progress(1, 100, 0.25), Streams(0)).noise_levels if eta]
    assert etas == pytest.approx(row["noise_levels_first_call_mean_reward_0.25"])
    # Not ours: alpha_sequence and bounds_after_one_update are a running mean and a running range, advanced by every call. A plan is a
    # value, so equal arguments give equal draws. And the release takes the draw for a late step where the reward is low.
    assert plan.draw(28, Progress(7, 100, 0.3), Streams(4)) == plan.draw(28, Progress(7, 100, 0.3), Streams(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProgressPlan((1, 2), (1, 2, 3)), "ProgressPlan.early and late must name one step per split each, at least one"),
        (lambda: ProgressPlan((), ()), "ProgressPlan.early and late must name one step per split each, at least one"),
        (lambda: ProgressPlan((2, 1), (2, 3)), r"ProgressPlan.early must not decrease; got \[2, 1\]"),
        (lambda: ProgressPlan((1, 2), (3, 2)), r"ProgressPlan.late must not decrease; got \[3, 2\]"),
        (lambda: ProgressPlan(eta=(0.5,)), "ProgressPlan.eta must be one number or 3, one per split; got 1"),
        (lambda: ProgressPlan(concentration=-1.0), "concentration"),
        (lambda: ProgressPlan(tail_guard=0), "tail_guard"),
        (lambda: ProgressPlan(min_gap=0), "min_gap"),
        (lambda: ProgressPlan(first=-1), "first"),
        (lambda: TreeSampler(5, ProgressPlan()), "ProgressPlan.early and late must be steps of the rollout, 0 to 4; got 5"),
        (
            lambda: TreeSampler(6, ProgressPlan(tail_guard=3)),
            "ProgressPlan: 3 splits that are 1 apart need 3 steps, but only the steps 1 to 2",
        ),
        (lambda: TreeSampler(6, ProgressPlan(eta=0.0)), "without noise"),
        (lambda: AdaptivePlan(0.5, 0.5), "AdaptivePlan.low must be below high, both in units of the raw reward; got 0.5 and 0.5"),
        (lambda: AdaptivePlan(math.nan, 0.5), "AdaptivePlan.low must be below high"),
        (lambda: AdaptivePlan(0, 1, eta_factors=(1.0,)), "AdaptivePlan.eta_factors must be two positive numbers"),
        (lambda: AdaptivePlan(0, 1, eta_factors=(1.0, 0.0)), "AdaptivePlan.eta_factors must be two positive numbers"),
        (lambda: AdaptivePlan(0, 1, eta=1.2), "AdaptivePlan.eta must be at most eta_max, 1; got 1.2"),
        (lambda: AdaptivePlan(0, 1, eta=(0.5, 0.6)), "AdaptivePlan.eta must be one number or 3, one per split; got 2"),
        (lambda: AdaptivePlan(0, 1, splits=0), "splits"),
        (lambda: TreeSampler(8, AdaptivePlan(0, 1, min_gap=4)), "AdaptivePlan: 3 splits that are 4 apart need 9 steps"),
        (lambda: TreeSampler(8, AdaptivePlan(0, 1, splits=1, promote_roots=True)), "AdaptivePlan.promote_roots needs a second split"),
    ],
)
def test_a_plan_that_cannot_keep_its_promise_is_refused_when_it_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
