"""Measures of a run on its way."""

from collections.abc import Callable, Sequence

import attrs

from diffalign import AlignmentLoop
from diffalign.core import Hook, Report

Row = dict[str, float]


@attrs.define(eq=False)
class Curve(Hook):
    """Measures a run after some of its steps.

    Args:
        at: steps done
        take: measures the loop
    """

    at: Sequence[int]
    take: Callable[[AlignmentLoop], Row]
    rows: list[Row] = attrs.field(factory=list, init=False)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if report.step + 1 in self.at:
            self.rows.append({"step": report.step + 1, **self.take(loop)})
