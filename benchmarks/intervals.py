"""How sure a mean over seeds is."""

import math
import statistics
from collections.abc import Sequence

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 8: 2.36, 10: 2.26, 12: 2.20, 16: 2.13, 20: 2.09}
"""Two-sided 95 % quantiles of Student's t by number of values; between two of them that of the fewer counts."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, mean +- t s / sqrt(n); one value has no width (NaN)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = next(T_95[count] for count in sorted(T_95, reverse=True) if count <= len(values))
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half width, as text."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} +- {half:.{digits}f}"
