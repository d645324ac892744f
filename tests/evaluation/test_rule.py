"""When the alarm rings, on series written down here."""

import pytest

from diffalign.evaluation import HackingAlarm

RULE = HackingAlarm().rule()


def lines(held_out, trained=None, diversity=None, error=0.05, groups=10, spread=0.3):
    """One for each number of `held_out`."""
    rising = [0.1 * step for step in range(len(held_out))]
    return [
        {
            "step": step,
            "trained": (trained or rising)[step],
            "diversity": (diversity or [0.0] * len(held_out))[step],
            "held_out": {"judge": value},
            "spread": {"judge": spread},
            "errors": {"judge": error},
            "groups": groups,
        }
        for step, value in enumerate(held_out)
    ]


def first_ring(series, total=90):
    return next(((stop, set(found)) for stop in range(1, len(series) + 1) if (found := RULE.rings(series[:stop], total))), None)


FALL = [0.7, 0.75, 0.65, 0.7, 0.72, 0.68, 0.7, 0.69, 0.71, 0.4, 0.38, 0.42, 0.4, 0.4, 0.4]


def test_a_fall_of_five_errors_rings_when_it_has_lasted():
    assert first_ring(lines(FALL)) == (12, {"judge"}), "it convinces with two fallen steps of three, and with three"


@pytest.mark.parametrize("period", [2, 3])
def test_a_reward_that_is_scored_at_some_steps_rings_by_those(period):
    scored = iter(lines(FALL))
    none = {"held_out": {}, "spread": {}, "errors": {}, "groups": {}}
    series = [
        {**(none if step % period else next(scored)), "step": step, "trained": 0.1 * step, "diversity": 0.0} for step in range(15 * period)
    ]
    assert first_ring(series) == (11 * period + 1, {"judge"}), "at the twelfth of its steps, as where there are no others"


def test_the_width_of_the_cut_scales_with_the_run():
    assert [RULE.least_window(total) for total in (10, 90, 300, 3000)] == [3, 3, 10, 100]
    assert first_ring(lines(FALL), total=300) is None
    assert HackingAlarm(window=7).rule().least_window(300) == 7


def test_a_reward_that_does_not_rise_is_not_exploited():
    assert first_ring(lines(FALL, trained=[0.1 * (step % 2) for step in range(len(FALL))])) is None


@pytest.mark.parametrize(("spread", "rings"), [(1.0, True), (1.4, False)])
def test_a_fall_must_matter(spread, rings):
    assert (first_ring(lines(FALL, spread=spread)) is not None) is rings, "0.3 is more than a quarter of 1.0, less than one of 1.4"


def test_noise_within_steps_is_believed():
    assert first_ring(lines(FALL, error=0.15)) is None


def test_one_bad_step_does_not_ring():
    assert first_ring(lines([*FALL[:9], 0.4, *FALL[:9]])) is None


def test_diversity_needs_no_reward_and_a_fall_that_matters():
    series = [0.02 * (step % 2) for step in range(12)]
    flat = [0.7 + 0.01 * (step % 2) for step in range(20)]
    gone, less = ([*series, *(value - fall for value in series[:8])] for fall in (1.0, 0.5))
    stop, kinds = first_ring(lines(flat, trained=flat, diversity=gone))
    assert kinds == {"diversity"}
    assert stop <= 18
    assert first_ring(lines(flat, trained=flat, diversity=less)) is None


def test_a_judge_that_came_later_is_watched_from_there():
    early = [{**line, "held_out": {}, "spread": {}, "errors": {}, "groups": 0} for line in lines([0.0] * 5)]
    late = lines(FALL)
    assert first_ring([*early, *late]) == (5 + 12, {"judge"})
    assert RULE.evidence([], 90) == {}
