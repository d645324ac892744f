"""Rule by which the hacking alarm rings, for a series that is being watched or was recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from .watch import Move, Series

DIVERSITY = "diversity"
Lines = Sequence[Mapping[str, Any]]
"""Lines of `watch.jsonl`, from the first step on."""


@attrs.frozen
class AlarmEvidence:
    """Fall of a held-out reward or of diversity, at the cut where it is clearest.

    Args:
        kind: "diversity", or the name of a held-out reward
        move: its change
        trained: change of the trained reward at the same cut
        least: least fall that counts
        measure: name of the measure of diversity
    """

    kind: str
    move: Move
    trained: Move
    least: float
    measure: str = "L-GMD"

    def __str__(self) -> str:
        if self.kind == DIVERSITY:
            said = f"diversity ({self.measure}) {self.move} while the trained reward {self.trained}. The policy may be collapsing"
            return f"{said}: look at its images, or lower beta."
        said = f"the trained reward {self.trained} while the held-out reward {self.kind!r} {self.move}"
        return f"{said}. The policy may be exploiting the reward: look at its images, lower beta, or train on the held-out reward as well."


@attrs.frozen
class Rule:
    """Rule of `HackingAlarm`, which explains it.

    Args:
        window, threshold, rise, fall, diversity_fall: see `HackingAlarm`
        measure: name of the measure of diversity
    """

    window: int | None
    threshold: float
    rise: float
    fall: float
    diversity_fall: float
    measure: str = "L-GMD"

    def least_window(self, total: int) -> int:
        """Steps that must lie on both sides of a cut."""
        return self.window or max(3, total // 30)

    def evidence(self, lines: Lines, total: int) -> dict[str, AlarmEvidence]:
        """Evidence in the lines, by kind, whether it is convincing or not.

        Args:
            lines: lines of all steps so far
            total: steps of the run
        """
        kinds = (*(lines[-1]["held_out"] if lines else ()), DIVERSITY)
        evidence = ((kind, self._of(_having(lines, kind), kind, total)) for kind in kinds)
        return {kind: found for kind, found in evidence if found is not None}

    def _of(self, known: Lines, kind: str, total: int) -> AlarmEvidence | None:
        """Evidence of one kind in the lines that have it; None where they are too few."""
        series = Series([line["diversity"] for line in known]) if kind == DIVERSITY else Series.held_out(known, kind)
        move = series.fallen(self.least_window(total))
        if move is None:
            return None
        trained = Series([line["trained"] for line in known]).moved(move.cut)
        return AlarmEvidence(kind, move, trained, self._least(known[: self.least_window(total)], kind), self.measure)

    def convinces(self, evidence: AlarmEvidence) -> bool:
        """True if the evidence is strong enough; the alarm rings when this holds for two steps in a row."""
        fallen = evidence.move.errors <= -self.threshold and evidence.move.before - evidence.move.now >= evidence.least
        return fallen and (evidence.kind == DIVERSITY or evidence.trained.errors >= self.rise)

    def rings(self, lines: Lines, total: int) -> dict[str, AlarmEvidence]:
        """Evidence that is convincing at the last step and at the step before that has this kind, by kind."""
        found = {kind: evidence for kind, evidence in self.evidence(lines, total).items() if self.convinces(evidence)}
        earlier = {kind: self._of(_having(lines, kind)[:-1], kind, total) for kind in found}
        return {kind: evidence for kind, evidence in found.items() if (before := earlier[kind]) is not None and self.convinces(before)}

    def _least(self, first: Lines, kind: str) -> float:
        if kind == DIVERSITY:
            return self.diversity_fall
        return self.fall * sum(float(line["spread"][kind]) for line in first) / len(first)


def _having(lines: Lines, kind: str) -> Lines:
    """Lines of the steps at which a held-out reward scored a picture, or for diversity of those that have it."""
    return [line for line in lines if kind in (line if kind == DIVERSITY else line["held_out"])]
