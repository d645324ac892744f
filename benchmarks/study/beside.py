"""Places of names beside points: near them, and off other names, points, intervals and the lines that lead from a point to its name."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""
Arm = tuple[tuple[float, float], tuple[float, float]]
"""Both ends of a straight line."""
AROUND = tuple((math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)) for turn in range(16))
"""Directions in which a name may stand."""


def names_beside(
    places: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bars: Sequence[Arm], room: Box, radius: float
) -> list[Box]:
    """Boxes of the names of points: near them, and beside other names, points and intervals.

    Args:
        places: pixels of the points
        sizes: width and height of each name
        bars: ends of the intervals
        room: box that no name leaves
        radius: of the points

    Each name in turn takes the cheapest of its places while the others keep theirs, until none moves or each had four turns.
    """
    candidates = [_candidates(place, size, room) for place, size in zip(places, sizes, strict=True)]
    chosen = [boxes[0] for boxes in candidates]
    dots = [(x - radius, y - radius, x + radius, y + radius) for x, y in places]
    arms = [(min(a[0], b[0]) - 2, min(a[1], b[1]) - 2, max(a[0], b[0]) + 2, max(a[1], b[1]) + 2) for a, b in bars]
    for _ in range(4):
        before = list(chosen)
        for index, place in enumerate(places):
            rest = [other for other in range(len(places)) if other != index]
            leaders = [(places[other], nearest(chosen[other], places[other])) for other in rest]
            filled = [*(chosen[other] for other in rest), *(dots[other] for other in rest)]
            chosen[index] = _cheapest(candidates[index], place, dots[index], filled, arms, leaders)
        if chosen == before:
            break
    return chosen


def _cheapest(
    boxes: Sequence[Box], place: tuple[float, float], dot: Box, filled: Sequence[Box], arms: Sequence[Box], leaders: Sequence[Arm]
) -> Box:
    """The box that hides and crosses least, and is near."""
    sides = [*leaders, *(side for other in filled for side in _diagonals(other))]
    best, least = boxes[0], math.inf
    for box in boxes:
        leader = place, nearest(box, place)
        hidden = sum(_shared(box, other) for other in (*filled, dot)) + sum(_shared(box, arm) for arm in arms) / 4
        cost = 30 * hidden + 12 * math.dist(*leader)
        if cost < least:  # crossings take longer to count
            cost += 3000 * sum(_meet(leader, side) for side in sides)
            cost += 3000 * sum(_meet(other, side) for other in leaders for side in _diagonals(box))
        if cost < least:
            best, least = box, cost
    return best


def nearest(box: Box, place: tuple[float, float]) -> tuple[float, float]:
    """Point of a box that is nearest to a place, where its leader ends."""
    return min(max(place[0], box[0]), box[2]), min(max(place[1], box[1]), box[3])


def _diagonals(box: Box) -> tuple[Arm, Arm]:
    return ((box[0], box[1]), (box[2], box[3])), ((box[0], box[3]), (box[2], box[1]))


def _meet(one: Arm, two: Arm) -> bool:
    """Whether two straight lines cross between their ends."""

    def side(line: Arm, place: tuple[float, float]) -> float:
        (x, y), (right, down) = line
        return (right - x) * (place[1] - y) - (down - y) * (place[0] - x)

    return side(one, two[0]) * side(one, two[1]) < 0 and side(two, one[0]) * side(two, one[1]) < 0


def _candidates(place: tuple[float, float], size: tuple[float, float], room: Box) -> list[Box]:
    """Boxes of a name around a point, nearest first, inside the room."""
    boxes, (wide, high) = [], size
    for far in (20, 40, 70, 110, 160, 220, 300):
        for right, down in AROUND:
            x, y = place[0] + far * right + (right - 1) * wide / 2, place[1] + far * down + (down - 1) * high / 2
            x, y = min(max(x, room[0]), room[2] - wide), min(max(y, room[1]), room[3] - high)
            boxes.append((x, y, x + wide, y + high))
    return boxes


def _shared(one: Box, two: Box) -> float:
    """Area that two boxes share."""
    wide, high = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(wide, 0.0) * max(high, 0.0)
