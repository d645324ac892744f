"""Measures of a run on its way."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from diffalign import AlignmentLoop
from diffalign.core import Hook, Report

Row = dict[str, float]


@attrs.define(eq=False)
class Curve(Hook):
    """Measures a run after some of its steps, and counts what its steps spent until then: network rows and seconds, without the measuring.

    Args:
        at: steps done
        take: measures the loop after a step, whose report it gets
    """

    at: Sequence[int]
    take: Callable[[AlignmentLoop, Report], dict[str, Any]]
    rows: list[dict[str, Any]] = attrs.field(factory=list, init=False)
    _spent: dict[str, float] = attrs.field(factory=lambda: {"rows": 0.0, "seconds": 0.0}, init=False)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        self._spent["rows"] += sum(report.ledger.rows.values())
        self._spent["seconds"] += sum(report.ledger.seconds.values())
        if report.step + 1 in self.at:
            self.rows.append({"step": report.step + 1, **self._spent, **self.take(loop, report)})
