"""Constants of the expected time of a call (`diffalign.costs.expected`), fitted to what one H100 took, and how far to trust them.

Counts the calls of `cost roofline --measured` on torch's meta device, and looks for the constants with the smallest sum of squared
logarithms of expected over measured times, by a random search from a fixed seed. The profile of one call (SD3.5-M, products in float32,
9 rows: 32.8 ms of products, 7.9 ms of attention) counts a quarter for each. Then again without each row in turn: that is what the
constants expect of a call that they have not seen. Takes two minutes on one core.

Args:
    trials: steps of the search
    json: also write constants and times here
"""

import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np

from benchmarks.cost.roofline import MEASURED, counted
from benchmarks.record import write
from benchmarks.subjects.published_shapes import MODELS
from diffalign.costs.cards import CARDS
from diffalign.costs.expected import EAGER, Reached
from diffalign.costs.operators import ATTENTION, CAST, ELEMENTWISE, Call

CARD = CARDS["h100"]
LOW = Reached(product=0.4, single=0.3, attention=0.15, half=0.2, full=0.3, kernel=0.0, host=5e-6)
HIGH = Reached(product=0.9, single=1.0, attention=0.9, half=1.0, full=1.0, kernel=8e-6, host=25e-6)
PROFILE = 1
"""Row whose profile is known, with the milliseconds below."""
PRODUCTS, ATTENTIONS = 32.8, 7.9


@attrs.frozen(eq=False)
class Counted:
    """Operators of a call as arrays: [n] operations, bytes, and what they are."""

    operations: np.ndarray
    moved: np.ndarray
    half: np.ndarray
    attention: np.ndarray
    elementwise: np.ndarray

    @classmethod
    def of(cls, call: Call) -> "Counted":
        found = call.operators
        kinds = np.array([operator.kind for operator in found])
        return cls(
            np.array([operator.operations for operator in found]),
            np.array([float(operator.moved) for operator in found]),
            np.array([operator.dtype.itemsize == 2 for operator in found]),
            kinds == ATTENTION,
            (kinds == CAST) | (kinds == ELEMENTWISE),
        )

    def on_the_device(self, reached: Reached) -> np.ndarray:
        """Seconds of each operator, as `Reached.operator` computes them: [n]."""
        half = np.where(self.attention, reached.attention, reached.product) * CARD.half
        rate = np.where(self.half, half, reached.single * CARD.single)
        moved = np.where(self.half & self.elementwise, reached.half, reached.full)
        return np.maximum(self.operations / rate, self.moved / (moved * CARD.bandwidth)) + reached.kernel


def milliseconds(reached: Reached, calls: Sequence[Counted]) -> float:
    return 1e3 * sum(max(float(call.on_the_device(reached).sum()), reached.host * len(call.moved)) for call in calls)


def loss(reached: Reached, rows: Sequence[Sequence[Counted]], kept: Sequence[int]) -> float:
    total = sum(math.log(milliseconds(reached, rows[row]) / MEASURED[row][4]) ** 2 for row in kept)
    (call,) = rows[PROFILE]
    each = 1e3 * call.on_the_device(reached)
    seen = ((each[call.attention].sum(), ATTENTIONS), (each[~call.attention & ~call.elementwise].sum(), PRODUCTS))
    return total + sum(math.log(mine / known) ** 2 / 4 for mine, known in seen)


def fitted(rows: Sequence[Sequence[Counted]], kept: Sequence[int], trials: int) -> Reached:
    drawn = np.random.default_rng(0)
    low, high = (np.array(attrs.astuple(bound)) for bound in (LOW, HIGH))
    best, width = (low + high) / 2, 0.5
    least = loss(Reached(*best), rows, kept)
    for trial in range(trials):
        moved = best + width * (high - low) * drawn.normal(size=len(best)) * (drawn.random(len(best)) < 0.4)
        tried = np.clip(moved, low, high)
        found = loss(Reached(*tried), rows, kept)
        if found < least:
            best, least = tried, found
        if trial % 100 == 99:
            width *= 0.75
    return Reached(*(float(value) for value in best))


def measured_calls() -> list[list[Counted]]:
    known = {}
    rows = []
    for name, adapters, count, backward, *_ in MEASURED:
        if (name, adapters) not in known:
            known[name, adapters] = counted(MODELS[name], adapters)
        both = known[name, adapters](count)
        rows.append([Counted.of(call) for call in ((both.forward, both.backward) if backward else (both.forward,))])
    return rows


def main(trials: int = 1500, json: Path | None = None) -> None:
    rows = measured_calls()
    every = range(len(rows))
    best = fitted(rows, every, trials)
    print(f"fitted      {best}\nin the package {EAGER}\n")
    print(f"{'call':34s} {'rows':>4s} {'ms':>6s} {'fitted':>7s} {'package':>8s} {'left out':>9s}")
    table = []
    for row in every:
        name, adapters, count, backward, measured, _ = MEASURED[row]
        without = fitted(rows, [other for other in every if other != row], trials)
        found = [milliseconds(each, rows[row]) for each in (best, EAGER, without)]
        what = f"{name} {adapters}{' +backward' if backward else ''}"
        print(f"{what:34s} {count:4d} {measured:6.0f} {found[0]:7.1f} {found[1]:8.1f} {found[2]:9.1f}", flush=True)
        table.append({"call": what, "rows": count, "measured": measured, "fitted": found[0], "package": found[1], "left_out": found[2]})
    write(json, {"fitted": attrs.asdict(best), "package": attrs.asdict(EAGER), "calls": table})
