import math
import random
from itertools import pairwise

import pytest

from diffalign.evaluation.watch import moved


def test_two_windows_are_needed():
    assert moved([1.0] * 7, 4) is None
    assert moved([1.0] * 8, 4) is not None


def test_a_step_by_hand():
    # neighbours differ at six of seven places by 1, 1, 1, 2, 1, 1, 1: s^2 = (6 + 4) / 7 / 2
    move = moved([0.0, 1.0, 0.0, 1.0, 3.0, 2.0, 3.0, 2.0], 4)
    assert (move.before, move.now) == (0.5, 2.5)
    assert move.errors == pytest.approx(2 / math.sqrt(10 / 14 * 2 / 4))
    assert str(move) == "rose from 0.500 to 2.500 (+3.3 standard errors)"


def test_without_noise_any_move_counts():
    assert moved([2.0] * 10, 5).errors == 0
    assert moved([1.0] * 5 + [1.0] * 5, 5).errors == 0


def test_a_trend_is_no_noise():
    assert moved([float(i) for i in range(20)], 5).errors == pytest.approx(15 / math.sqrt(0.5 * 2 / 5))


def test_noise_alone_seldom_moves_four_errors():
    source = random.Random(0)
    rings = 0
    for _ in range(100):
        series = [source.gauss(0, 1) for _ in range(60)]
        low = [moved(series[:stop], 5).errors <= -4 for stop in range(10, 61)]
        rings += any(first and second for first, second in pairwise(low))
    assert rings <= 2
