"""The least time that a step can take on a card: a bound from operations and bytes alone."""

from collections.abc import Iterator

import attrs

from .cards import Card
from .rows import Counted

_OPTIMIZER_BYTES = 28
"""AdamW reads weight, gradient and two moments of a number and writes all but the gradient, in float32."""


@attrs.frozen
class Work:
    """The network calls of a step on one device.

    Args:
        rollout: rows of each call of the rollout
        update: rows of each call with a forward and a backward pass
        beside: rows of each call of the update without gradient: to weigh pieces, and of a reference
        trained: numbers that an optimizer steps
    """

    rollout: tuple[int, ...]
    update: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    trained: int = 0


@attrs.frozen
class Bound:
    """What a stage takes at least.

    Args:
        seconds: on the device
        useful: operations that the mathematics needs; of rows that carry a gradient forward and backward
        operators: that are started, one after the other where nothing is fused
    """

    seconds: float
    useful: float
    operators: int

    def share(self, peak: float) -> float:
        """Of the peak, at most: useful / (seconds peak)."""
        return self.useful / max(self.seconds * peak, 1e-300)


def pieces(rows: int, budget: int | None) -> tuple[int, ...]:
    """Rows in calls of at most so many; None takes all at once."""
    if budget is None or rows <= budget:
        return (rows,) if rows else ()
    return (budget,) * (rows // budget) + ((rows % budget,) if rows % budget else ())


def bounds(counted: Counted, work: Work, card: Card, *, fused: bool = False) -> tuple[Bound, Bound]:
    """Rollout and update: sums over calls and operators of max(operations / peak, bytes / bandwidth).

    No run is faster, whatever its kernels. Nothing of the host is in it: starting an operator costs some microseconds, which small calls
    are made of. No decoding, no rewards.

    Args:
        counted: of the policy that is trained; a reference is taken to cost as much
        work: of the step
        card: that it runs on
        fused: what is no product moves nothing of its own, as if a compiler had fused it with a neighbour

    Reference: Williams et al., Roofline, Communications of the ACM 52(4), 2009.
    """

    def forward(rows: int) -> Bound:
        call = counted(rows).forward
        return Bound(call.seconds(card, fused=fused), call.useful, len(call.operators))

    def backward(rows: int) -> Bound:
        call = counted(rows).backward
        return Bound(call.seconds(card, fused=fused), call.useful, len(call.operators))

    beside = _added(map(forward, work.beside))
    trained = _added(part for rows in work.update for part in (forward(rows), backward(rows)))
    optimizer = work.trained * _OPTIMIZER_BYTES / card.bandwidth
    update = Bound(trained.seconds + beside.seconds + optimizer, trained.useful, trained.operators + beside.operators)
    return _added(map(forward, work.rollout)), update


def _added(parts: Iterator[Bound]) -> Bound:
    found = list(parts)
    return Bound(sum(b.seconds for b in found), sum(b.useful for b in found), sum(b.operators for b in found))
