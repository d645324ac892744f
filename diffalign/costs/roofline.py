"""Time of a step on a card from operations and bytes: its lower bound, and what is expected in torch's eager mode."""

from collections.abc import Callable, Iterator

import attrs

from .cards import Card
from .expected import EAGER, Reached
from .operators import Call
from .rows import Counted

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
    """

    rollout: tuple[int, ...]
    update: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    trained: int = 0


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
    return _stages(counted, work, card, lambda call: call.seconds(card, fused=fused))


def expected(counted: Counted, work: Work, card: Card, reached: Reached = EAGER) -> tuple[Bound, Bound]:
    """Expect rollout and update in torch's eager mode: the same sums, with what kernels reach and what starting them takes.

    Args:
        counted: calls of the policy that is trained
        work: network calls of the step
        card: card on which it runs
        reached: shares of the data sheet that kernels reach
    """
    return _stages(counted, work, card, lambda call: reached.call(call, card))


def _stages(counted: Counted, work: Work, card: Card, seconds: Callable[[Call], float]) -> tuple[Bound, Bound]:
    known: dict[int, tuple[Bound, Bound]] = {}

    def calls(rows: int) -> tuple[Bound, Bound]:
        if rows not in known:
            both = counted(rows)
            forward, backward = (Bound(seconds(call), call.useful, len(call.operators)) for call in (both.forward, both.backward))
            known[rows] = forward, backward
        return known[rows]

    beside = _added(calls(rows)[0] for rows in work.beside)
    trained = _added(part for rows in work.update for part in calls(rows))
    optimizer = work.trained * _OPTIMIZER_BYTES / card.bandwidth
    update = Bound(trained.seconds + beside.seconds + optimizer, trained.useful, trained.operators + beside.operators)
    return _added(calls(rows)[0] for rows in work.rollout), update


def _added(parts: Iterator[Bound]) -> Bound:
    found = list(parts)
    return Bound(sum(b.seconds for b in found), sum(b.useful for b in found), sum(b.operators for b in found))
