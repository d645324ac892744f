"""Rules of the GenEval benchmark: reads what a prompt asks for, and checks detected objects against it. No network is used."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import ConfigError
from diffalign.vocabulary import COLORS, POSITIONS

Box = tuple[float, float, float, float]


@attrs.frozen(eq=False)
class Detected:
    """Detected object.

    Args:
        score: confidence in [0, 1]
        box: left, top, right, bottom in pixels; right and bottom are the first pixels outside
        mask: [H, W] bool, its pixels
    """

    score: float
    box: Box
    mask: Tensor


ColorOf = Callable[[str, Sequence[Detected]], Sequence[str]]
"""Function from a class and objects of it to their colours."""


@attrs.frozen
class Clause:
    """Condition on an image: `count` objects of a class, optionally with a colour, and with a position relative to an earlier clause.

    Args:
        name: the class
        count: number of objects
        color: colour of each object; None for any
        position: (relation, number of the earlier clause); None for any
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@attrs.frozen
class Wanted:
    """Conditions that a prompt of the benchmark sets.

    Args:
        include: clauses that must all hold
        exclude: clauses of which none may hold: `count` objects of a class, or more
        counting: whether objects are counted, which needs surer detections
    """

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    counting: bool


def wanted(prompt: str, names: Collection[str]) -> Wanted:
    """Read a prompt's metadata in the form of the benchmark's files.

        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
        {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}

    Args:
        prompt: prompt with metadata
        names: classes that the detector knows

    Raises:
        ConfigError: an entry is missing or has another form; the message names the prompt.
    """
    metadata: Mapping[str, Any] = getattr(prompt, "metadata", {})
    if not metadata.get("include"):
        raise ConfigError(
            f"GenEval needs the objects that an image should show: prompt {str(prompt)!r} has no metadata 'include'. "
            'The form is {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}.'
        )
    clauses = {}
    for kind in ("include", "exclude"):
        entries = metadata.get(kind, ())
        if not isinstance(entries, list | tuple):
            raise ConfigError(f"metadata {kind!r} of prompt {str(prompt)!r} must be a list; got {entries!r}")
        where = f"metadata {kind!r} of prompt {str(prompt)!r}"
        clauses[kind] = tuple(_clause(entry, place, names, where) for place, entry in enumerate(entries))
    return Wanted(clauses["include"], clauses["exclude"], metadata.get("tag") == "counting")


def _clause(entry: Any, place: int, names: Collection[str], where: str) -> Clause:
    if not isinstance(entry, Mapping) or set(entry) - {"class", "count", "color", "position"} or not {"class", "count"} <= set(entry):
        raise ConfigError(f"{where}: an entry must have class and count, and may have color and position; got {entry!r}")
    name, count = entry["class"], entry["count"]
    color, position = entry.get("color"), entry.get("position")
    if name not in names:
        raise ConfigError(f"{where}: the detector knows no {name!r}; it knows {', '.join(sorted(names)[:5])}, ...")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{where}: count must be a whole number of at least 1; got {count!r}")
    if color is not None and color not in COLORS:
        raise ConfigError(f"{where}: color must be one of {', '.join(COLORS)}; got {color!r}")
    if position is None:
        return Clause(name, count, color)
    if not (isinstance(position, list | tuple) and len(position) == 2 and position[0] in POSITIONS and position[1] in range(place)):
        raise ConfigError(f"{where}: position must be one of {', '.join(POSITIONS)}, and an earlier entry's number; got {position!r}")
    return Clause(name, count, color, (position[0], int(position[1])))


def relations(box: Box, other: Box, slack: float) -> set[str]:
    """Relations of the first box to the second, such as "left of".

    With d the offset of the centres and s the sizes, d' = sign(d) max(|d| - slack (s_1 + s_2), 0). "left of" holds if d'_x / |d| < -1/2,
    and the others accordingly. Boxes that are too close have no relation.
    """
    a, b = (torch.tensor(value, dtype=torch.float64).view(2, 2) for value in (box, other))
    offset = a.mean(dim=0) - b.mean(dim=0)
    apart = (offset.abs() - slack * ((a[1] - a[0]).abs() + (b[1] - b[0]).abs())).clamp(min=0) * offset.sign()
    if bool((apart.abs() < 1e-3).all()):
        return set()
    x, y = (apart / offset.norm()).tolist()
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def correct(want: Wanted, found: Mapping[str, Sequence[Detected]], color_of: ColorOf, slack: float) -> bool:
    """Check whether an image shows what the prompt asks for, as the benchmark counts it.

    Every clause of `include` must hold for the surest `count` objects of its class, and none of `exclude`. More objects than `count` do no
    harm if no clause of `exclude` says so.

    Args:
        want: conditions of the prompt
        found: detected objects by class, surest first
        color_of: (class, objects) -> their colours
        slack: slack of `relations`
    """
    matched: list[Sequence[Detected]] = []
    for clause in want.include:
        objects = list(found.get(clause.name, ()))[: clause.count]
        if len(objects) < clause.count or (clause.color is not None and _painted(clause, objects, color_of) < clause.count):
            return False
        if clause.position is not None and not _placed(clause.position, objects, matched, slack):
            return False
        matched.append(objects)
    return all(len(found.get(clause.name, ())) < clause.count for clause in want.exclude)


def graded(want: Wanted, found: Mapping[str, Sequence[Detected]], color_of: ColorOf, slack: float) -> float:
    """Score how nearly an image shows what the prompt asks for: the mean of some terms, each 1 where it is exact.

        1 - |n - m| / n     for each clause of `include`: n objects of its class are wanted, m are there
        1 - |n - k| / n     and for its colour: k of them have it; 0 where m is not n
        1 or 0              and for its position; 0 where m is not n, where the colour fails, or where the others do not hold

    A count can be far too large, so it can be negative. `exclude` says nothing that the counts do not say.

    Args:
        want: content that the prompt asks for
        found: by class, surest first
        color_of: (class, objects) -> their colours
        slack: slack of `relations`

    Reference: the reward that Flow-GRPO (arXiv:2505.05470) is trained with. There a position that fails adds the terms 0 and 1, here 0.
    """
    terms: list[float] = []
    matched: list[Sequence[Detected] | None] = []
    for clause in want.include:
        objects = list(found.get(clause.name, ()))
        terms.append(_nearly(clause.count, len(objects)))
        good = len(objects) == clause.count
        if clause.color is not None:
            painted = _painted(clause, objects, color_of) if good else 0
            terms.append(_nearly(clause.count, painted))
            good = painted == clause.count
        if clause.position is not None:
            good = good and matched[clause.position[1]] is not None and _placed(clause.position, objects, matched, slack)
            terms.append(float(good))
        matched.append(objects if good else None)
    return sum(terms) / len(terms)


def _nearly(wanted: int, there: int) -> float:
    return 1 - abs(wanted - there) / wanted


def _painted(clause: Clause, objects: Sequence[Detected], color_of: ColorOf) -> int:
    return list(color_of(clause.name, objects)).count(str(clause.color))


def _placed(position: tuple[str, int], objects: Sequence[Detected], matched: Sequence[Sequence[Detected] | None], slack: float) -> bool:
    relation, place = position
    return all(relation in relations(mine.box, other.box, slack) for mine in objects for other in matched[place] or ())
