import math
import random
from itertools import pairwise

import pytest

from diffalign.evaluation.watch import Series


def normal_deviate(t, freedom):
    """That of the same probability as Student's t, by adding up the density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    width = 1e-3
    below = (
        0.5
        + sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in (width * (i + 0.5) for i in range(round(t / width)))) * width
    )
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < below else (low, middle)
    return low


def test_two_windows_are_needed():
    assert Series([1.0] * 7).fallen(4) is None
    assert Series([1.0] * 8).fallen(4) is not None


def test_a_step_by_hand():
    # neighbours differ by 1, 1, 1, 2, 1, 1, 1: s^2 = (6 + 4) / 7 / 2
    move = Series([0.0, 1.0, 0.0, 1.0, 3.0, 2.0, 3.0, 2.0]).moved(4)
    assert (move.before, move.now, move.cut) == (0.5, 2.5, 4)
    t, freedom = 2 / math.sqrt(10 / 14 * 2 / 4), 2 * 49 / 20
    assert move.errors == pytest.approx(normal_deviate(t, freedom), rel=0.01)
    assert str(move) == f"rose from 0.500 to 2.500 (+{move.errors:.1f} standard errors)"


@pytest.mark.parametrize("freedom", [3, 9, 90])
def test_errors_are_those_of_a_normal_deviate(freedom):
    move = Series([0.0] * 5 + [0.2] * 5, [(0.16, freedom)]).moved(5)
    t = 0.2 / (0.4 * math.sqrt(2 / 5))
    assert move.errors == pytest.approx(normal_deviate(t, freedom), rel=0.01)


def test_neighbours_before_the_cut_count_where_they_differ_by_more():
    values = [0.0, 1.0, 0.0, 1.0, 0.0, -1.0, -2.0, -3.0]
    loud, quiet, half = (Series(values, [(variance, 9)] * 8).moved(5) for variance in (2.0, 0.1, 0.5))
    assert quiet == half, "half a square of neighbours' differences is 0.5 before the cut"
    assert abs(loud.errors) < abs(half.errors)
    steep = Series([*values[:5], -9.0, -20.0, -30.0], [(0.5, 9)] * 8).moved(5)
    assert steep.errors < half.errors, "a fall is no noise"


def test_the_clearest_cut_is_found():
    values = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 0.5, 0.4, 0.6]
    move = Series(values, [(0.01, 9)] * 10).fallen(2)
    assert (move.cut, move.before, move.now) == (7, pytest.approx(1.0), pytest.approx(0.5))
    assert move.errors == min(Series(values, [(0.01, 9)] * 10).moved(cut).errors for cut in range(2, 9))


def test_without_noise_any_move_counts():
    assert Series([0.1] * 10).fallen(5).errors == 0
    assert Series([-0.7] * 7, [(0.0, 9)]).fallen(3).errors == 0
    assert Series([2.0] * 5 + [1.0] * 5, [(0.0, 9)]).moved(5).errors == -math.inf


def test_lines_without_errors_leave_the_noise_to_neighbours():
    old = [{"held_out": {"judge": value}} for value in (0.0, 1.0, 0.0)]
    new = [{"held_out": {"judge": 1.0}, "errors": {"judge": 0.1}, "groups": groups} for groups in (1, 4)]
    series = Series.held_out([*old, *new], "judge")
    assert series.values == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert series.variances == [(pytest.approx(0.01), 3)]


@pytest.mark.parametrize("groups", [1, 10])
def test_noise_alone_seldom_moves_far(groups):
    source = random.Random(0)
    rings = 0
    for _ in range(100):
        values = [source.gauss(0, 1) for _ in range(60)]
        variances = [(source.gammavariate((groups - 1) / 2, 2) / (groups - 1), groups - 1) for _ in values] if groups > 1 else []
        low = [Series(values[:stop], variances[:stop]).fallen(3).errors <= -4.5 for stop in range(6, 61)]
        rings += any(first and second for first, second in pairwise(low))
    assert rings <= 1
