"""Has a noisy series moved since it began? The statistic behind the alarm."""

import math
from collections.abc import Sequence
from itertools import pairwise

import attrs


@attrs.frozen
class Move:
    """The mean of the last steps against that of the first.

    Args:
        before, now: the two means
        errors: (now - before) in standard errors
    """

    before: float
    now: float
    errors: float

    def __str__(self) -> str:
        verb = "rose" if self.now > self.before else "fell"
        return f"{verb} from {self.before:.3f} to {self.now:.3f} ({self.errors:+.1f} standard errors)"


def moved(series: Sequence[float], window: int) -> Move | None:
    """Compare the last `window` values with the first.

        errors = (mean of the last w - mean of the first w) / (s sqrt(2 / w)),   s^2 = mean of (y_i+1 - y_i)^2 / 2

    The noise s is taken from neighbouring steps, so that a trend does not count as noise.

    Returns:
        None while there are fewer than two windows.
    """
    if len(series) < 2 * window:
        return None
    before, now = sum(series[:window]) / window, sum(series[-window:]) / window
    squares = [(after - first) ** 2 for first, after in pairwise(series)]
    noise = math.sqrt(sum(squares) / len(squares) / 2 * 2 / window)
    if noise == 0:
        return Move(before, now, 0.0 if now == before else math.copysign(math.inf, now - before))
    return Move(before, now, (now - before) / noise)
