"""Time of a step on a card from operations and bytes: its lower bound, and what is expected."""

import functools
from collections.abc import Callable, Iterable

import attrs

from .cards import Card
from .expected import Manner
from .operators import Call
from .rows import Counted

_Seconds = Callable[[Call, int], float]
"""Seconds of a call of some rows."""

EAGERLY = Manner()
"""torch's eager mode, in which the host starts each operator."""

_OPTIMIZER_BYTES = 28
"""AdamW reads weight, gradient and two moments of a number and writes all but the gradient, in float32."""


@attrs.frozen
class Work:
    """Network calls of a step on one device.

    Args:
        rollout: rows of each call of the rollout
        update: rows of each call with a forward and a backward pass
        beside: rows of each call of the update without gradient: calls that weigh pieces, and calls of a reference
        trained: count of the numbers that an optimizer updates
        kept: rows of each call of the rollout through whose graph the update goes back
    """

    rollout: tuple[int, ...]
    update: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    trained: int = 0
    kept: tuple[int, ...] = ()


@attrs.frozen
class Bound:
    """Time of a stage, as a bound or as expected.

    Args:
        seconds: time on the device
        useful: operations that the mathematics needs: forward, and also backward for rows that carry a gradient
        operators: number of operators that are started if nothing is fused
    """

    seconds: float
    useful: float
    operators: int

    def share(self, peak: float) -> float:
        """Largest share of the peak that is possible: useful / (seconds * peak)."""
        return self.useful / max(self.seconds * peak, 1e-300)


def pieces(rows: int, budget: int | None) -> tuple[int, ...]:
    """Split rows into calls of at most `budget` rows. None makes one call of all rows."""
    if budget is None or rows <= budget:
        return (rows,) if rows else ()
    return (budget,) * (rows // budget) + ((rows % budget,) if rows % budget else ())


def bounds(counted: Counted, work: Work, card: Card, *, fused: bool = False) -> tuple[Bound, Bound]:
    """Bound rollout and update: sums over calls and operators of max(operations / peak, bytes / bandwidth).

    No run is faster, whatever its kernels. The host is not counted: it needs some microseconds to start an operator, and small calls take
    little else. Decoding and rewards are not counted.

    Args:
        counted: calls of the policy that is trained; a reference counts as much
        work: network calls of the step
        card: card on which it runs
        fused: whether casts and elementwise operators move no bytes, as if a compiler had fused them with a neighbour

    Reference: Williams et al., Roofline, Communications of the ACM 52(4), 2009.
    """

    def seconds(call: Call, rows: int) -> float:
        return call.seconds(card, fused=fused)

    return _stages(counted, work, card, seconds, seconds)


def expected(counted: Counted, work: Work, card: Card, manner: Manner = EAGERLY) -> tuple[Bound, Bound]:
    """Expect rollout and update: the same sums, with what kernels reach and what starting them takes.

    Args:
        counted: calls of the policy that is trained
        work: network calls of the step
        card: card on which it runs
        manner: shares of the data sheet that calls reach
    """

    def alone(call: Call, rows: int) -> float:
        return manner.alone(rows).call(call, card)

    def tracked(call: Call, rows: int) -> float:
        return manner.tracked.call(call, card)

    return _stages(counted, work, card, alone, tracked)


def _stages(counted: Counted, work: Work, card: Card, alone: _Seconds, tracked: _Seconds) -> tuple[Bound, Bound]:
    """Rollout and update by the seconds of a call without gradient, and of one with it."""

    @functools.cache
    def seen(rows: int) -> Bound:
        call = counted(rows).forward
        return Bound(alone(call, rows), call.useful, len(call.operators))

    @functools.cache
    def both(rows: int) -> Bound:
        found = counted(rows)
        return _added(Bound(tracked(call, rows), call.useful, len(call.operators)) for call in (found.forward, found.backward))

    @functools.cache
    def back(rows: int) -> Bound:
        call = counted(rows).backward
        return Bound(tracked(call, rows), call.useful, len(call.operators))

    beside, trained = _added(map(seen, work.beside)), _added((*map(both, work.update), *map(back, work.kept)))
    optimizer = work.trained * _OPTIMIZER_BYTES / card.bandwidth
    update = Bound(trained.seconds + beside.seconds + optimizer, trained.useful, trained.operators + beside.operators)
    return _added(map(seen, work.rollout)), update


def _added(parts: Iterable[Bound]) -> Bound:
    found = list(parts)
    return Bound(sum(b.seconds for b in found), sum(b.useful for b in found), sum(b.operators for b in found))
