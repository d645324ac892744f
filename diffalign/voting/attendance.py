"""Hook of votes: opens and closes what they need, and draws the same pictures at the start and now."""

import io
from pathlib import Path
from typing import Protocol

import attrs
from PIL import Image

from ..core import AlignmentLoop, ConfigError, Hook, Interrupted, Report
from ..core.scoring import inner
from ..core.unessential import say, unessential
from ..runs.pictures import drawn
from .record import VoteRecord, described
from .voters import Voters

_PROMPTS = 4


class Session(Protocol):
    """Votes, as their hook needs them."""

    voters: Voters

    @property
    def record(self) -> VoteRecord: ...

    def place(self, folder: Path | None) -> Path | None: ...

    def open(self, folder: Path | None, step: int, total: int) -> None: ...

    def due(self, step: int) -> bool: ...


def attendance(votes: Session) -> Hook:
    """Hook that opens the votes file and the voters with a run, shows them how far it is, and closes them with it."""
    return _Attendance(votes)


@attrs.define(eq=False)
class _Attendance(Hook):
    votes: Session
    _before: bytes = attrs.field(default=b"", init=False, repr=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._require_own_file(loop)
        self.votes.open(loop.folder, step, total)
        if self.votes.voters.strip:
            now = self._sheet(loop, step)
            self._before = self._first(loop, step, now)
            self.votes.voters.show(self._before, now, step)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        done = report.step + 1
        if self.votes.voters.ended():
            raise Interrupted("ended by the voters")
        if self.votes.voters.paused() and done < report.total:  # a step that asks has stopped already
            raise Interrupted("paused by the voters")
        if self.votes.voters.strip and (self.votes.due(done) or done == report.total):
            self.votes.voters.show(self._before, self._sheet(loop, done), done)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        self.votes.voters.stop()
        record = self.votes.record
        if record.count():
            people = ", ".join(f"{record.count(person)} of {person}" for person in record.people)
            say("; ".join([f"votes: {people}", *described(record.between())]))

    def _require_own_file(self, loop: AlignmentLoop) -> None:
        """Refuse votes of several rewards in one file, because each would count the others' as its own."""
        file = self.votes.place(loop.folder)
        if file is None:
            return
        rewards: dict[str, object] = {name: inner(reward) for name, reward in loop.named_rewards().items()}
        places = {name: each.place(loop.folder) for name, each in rewards.items() if isinstance(each, type(self.votes))}
        names = [name for name, place in places.items() if place is not None and place.resolve() == file.resolve()]
        if len(names) > 1:
            raise ConfigError(
                f"rewards {', '.join(map(repr, names))} must keep their votes in different files; they have one, {file}. Give a `file` to "
                "all but one of them."
            )

    def _first(self, loop: AlignmentLoop, step: int, now: bytes) -> bytes:
        """The pictures before the first step, which a run that is continued has kept; without them those of now."""
        kept = None if loop.folder is None else loop.folder / "images" / "votes-start.png"
        if step and kept is not None and kept.exists():
            return kept.read_bytes()
        if kept is not None:
            with unessential(str(kept)):
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(now)
        return now

    def _sheet(self, loop: AlignmentLoop, step: int) -> bytes:
        buffer = io.BytesIO()
        sheet: Image.Image = drawn(loop, step, _PROMPTS, self.votes.voters.strip, 0)
        sheet.save(buffer, "PNG")
        return buffer.getvalue()
