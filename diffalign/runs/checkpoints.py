"""Checkpoints: everything that a run needs to continue as if it had never stopped; which are kept, and from which a run continues."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from ..core import AlignmentLoop, CheckpointError, ContractError, Hook, Interrupted, NonFiniteError, Report, RewardError, agree
from ..core.unessential import say
from ..durable import discard
from .best import BEST, Score, evaluated, held_out_score, keep, training_score, value_to_beat
from .identity import differences, listed
from .lock import is_held_elsewhere
from .settings import OPTIMIZERS, changes
from .snapshot import (
    CONFIG,
    RunSnapshot,
    checkpoints,
    complete_checkpoints,
    is_whole,
    load,
    load_weights,
    name_complete,
    read_manifest,
    save,
    state_of,
    step_of,
    write,
)

_SHARED = (RewardError, NonFiniteError, ContractError)
"""Errors that end a step in all processes."""

__all__ = ["Checkpoints", "complete_checkpoints", "load", "load_weights", "read_manifest", "save"]


@attrs.define(eq=False)
class Checkpoints(Hook):
    """Writes `step-NNNNNN/` every `every` steps, at the end, and when the run is interrupted or a step fails; keeps the best as `best/`.

    Of a step that fails before weights have moved the finished step before it is kept.

    If a hook before this one evaluates the run while it trains (a `HeldOutEvaluation` with `every`), the best weights are those with the
    highest reward on held-out prompts. They are kept even if no other checkpoint is due at their step. Otherwise the best checkpoint is
    the one with the highest mean raw reward in the `every` steps before it.

    Args:
        folder: folder of the run
        every: steps between checkpoints
        config: resolved configuration, which the checkpoint holds
        keep: number of latest checkpoints that are kept
        settings: result of `settings_of` before the run; `restore` says what has changed
    """

    folder: Path
    every: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    config: str = ""
    keep: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    _saved: int | None = attrs.field(default=None, init=False)
    _rewards: list[float] = attrs.field(factory=list, init=False)
    _prompts: Mapping[str, Any] | None = attrs.field(default=None, init=False)
    _evaluated: list[str] = attrs.field(factory=list, init=False)
    """Held-out prompts of the last evaluation before a resume."""
    _finished: tuple[int, Mapping[str, Any]] | None = attrs.field(default=None, init=False)
    """Steps done, and the state of the parts after them, which the step under way may have moved on."""

    def restore(self, loop: AlignmentLoop) -> int:
        """Load the last complete checkpoint of the folder; returns the number of steps done.

        Raises:
            CheckpointError: there is none, or it was written with other settings of the optimizers.
        """
        last = self._last()
        changed = changes(_facts_of(last).get("settings", {}), self.settings)
        if undone := [change for path, change in changed.items() if path.startswith(OPTIMIZERS)]:
            raise CheckpointError(
                f"{last} was written with other optimizers: {'; '.join(undone)}. Their state would bring the old values back, so the new "
                "ones would do nothing. Give the same ones, or another folder; `lr_factor` changes learning rates over a run."
            )
        if changed and loop.devices.rank == 0:
            shown, more = "; ".join([*changed.values()][:8]), f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
            say(f"{last} was written with other settings: {shown}{more}. The run goes on with those of now.")
        if not any(path.startswith("prompts") for path in changed):
            _say_other_prompts(last, loop)
        self._evaluated = _evaluated_texts(self.folder)
        return load(loop, last)

    def resume(self, loop: AlignmentLoop, new_total: bool = False) -> int:
        """Restore a run in order to continue it, only from a checkpoint of the same configuration.

        Args:
            loop: the loop that was built from `config`
            new_total: accept another total, although schedules depend on it

        Raises:
            CheckpointError: there is none, or it has another configuration; the message shows the difference.
        """
        last = self._last()
        self.require_same_run(last, new_total)
        _say_other_prompts(last, loop)
        self._evaluated = _evaluated_texts(self.folder)
        return load(loop, last)

    def require_same_run(self, written: Path, new_total: bool = False) -> None:
        """Refuse a checkpoint, or a run folder, that holds another configuration.

        Args:
            written: folder with a `config.yaml`; a folder without one is accepted
            new_total: see `resume`

        Raises:
            CheckpointError: the configuration differs; the message shows where.
        """
        file = written / CONFIG
        changed = differences(file.read_text(encoding="utf-8"), self.config) if file.exists() else []
        if changed := [change for change in changed if not (new_total and change[0] == "total")]:
            shown = "; ".join(f"{path} was {before}, is now {after}" for path, before, after in changed[:8])
            more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
            total = " (a new total is accepted with --new-total)" if any(path == "total" for path, *_ in changed) else ""
            raise CheckpointError(f"{written} has another configuration: {shown}{more}. Give the same values or another folder{total}.")

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if loop.devices.rank == 0 and self.folder.exists():
            for name in (f"{BEST}.tmp", f"{BEST}.old.tmp"):  # a crash between the two names of the best
                if not (self.folder / BEST).exists() and is_whole(self.folder / name, quiet=True):
                    (self.folder / name).rename(self.folder / BEST)
            for left in self.folder.glob("*.tmp"):  # a crash while writing
                if left.name.startswith(("step-", f"{BEST}.")) and left.is_dir():
                    shutil.rmtree(left)
            require_none_after(self.folder, step)
        self._saved, self._rewards, self._prompts = None, [], listed(loop.prompts)
        _say_other_held_out(self._evaluated, loop)
        self._evaluated = []
        if step:
            self._rewards = _rewards_of(self.folder / f"step-{step:06d}")
            self._judge(loop, step, step % self.every == 0)  # a crash between a checkpoint and the best
            self._saved = step
        self._note(loop, step)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if "reward" in report.metrics:
            self._rewards = [*self._rewards, report.metrics["reward"]][-self.every :]
        done = report.step + 1
        due = done % self.every == 0
        if due:
            self._save(loop, done)
        self._judge(loop, done, due)
        self._note(loop, done)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        # weights and optimizers fit together at the end, and when a signal waited for the end of its step; not after an error
        if (error is None or isinstance(error, Interrupted)) and step != self._saved:
            self._save(loop, step)
        elif _spares_weights(error, loop) and step and step != self._saved and self._finished is not None:
            noted, state = self._finished
            self._save(loop, step, state if noted == step else None)  # nothing has moved if it came while hooks saw that step
        if error is None and step:
            self._judge(loop, step, True)

    def _note(self, loop: AlignmentLoop, step: int) -> None:
        """Keep the small state of a finished step."""
        self._finished = (step, state_of(loop))

    def _last(self) -> Path:
        if not is_held_elsewhere(self.folder):
            name_complete(self.folder)
        found = complete_checkpoints(self.folder)
        if not found:
            damaged = ", ".join(path.name for path in checkpoints(self.folder))
            said = f"these are damaged: {damaged}. Put their files back, or remove them to begin anew" if damaged else "there is none"
            raise CheckpointError(f"{self.folder} must hold a checkpoint step-*/ to resume from; {said}")
        return found[-1]

    def _save(self, loop: AlignmentLoop, step: int, state: Mapping[str, Any] | None = None) -> None:
        snapshot, failed = RunSnapshot.of(loop, state), None
        if loop.devices.rank == 0:
            try:
                write(snapshot, self.folder / f"step-{step:06d}", self._facts(loop, step, training_score(self._rewards)), self.config)
                self._prune(step)
            except (CheckpointError, OSError) as error:
                failed = error
        agree(loop.devices, failed)
        self._saved = step

    def _facts(self, loop: AlignmentLoop, step: int, score: Score | None) -> dict[str, Any]:
        judged = {"score": None} if score is None else {"score": score.value, "measure": score.measure}
        return {
            "step": step,
            "reward": loop.reward,
            **judged,
            "rewards": self._rewards,
            "prompts": self._prompts,
            "settings": dict(self.settings),
        }

    def _judge(self, loop: AlignmentLoop, step: int, due: bool) -> None:
        """Keep the weights of this step if they are the best so far. All processes decide alike."""
        score = held_out_score(loop, step) if evaluated(loop) else training_score(self._rewards) if due else None
        if score is None:
            return
        better = loop.devices.rank == 0 and score.value > value_to_beat(self.folder, score.measure)
        if not int(loop.devices.maximum(torch.tensor(int(better)))):
            return
        snapshot, failed = None if self._saved == step else RunSnapshot.of(loop), None
        if loop.devices.rank == 0:
            try:
                if snapshot is None:
                    keep(self.folder / f"step-{step:06d}", score)
                else:
                    write(snapshot, self.folder / BEST, self._facts(loop, step, score), self.config)
            except (CheckpointError, OSError) as error:
                failed = error
        agree(loop.devices, failed)

    def _prune(self, step: int) -> None:
        """Keep the last few checkpoints up to `step`. Later ones are damaged: they were skipped when this run started."""
        found = checkpoints(self.folder)
        done = [path for path in found if step_of(path) <= step]
        for path in [*done[: -self.keep], *(path for path in found if step_of(path) > step)]:
            discard(path)


def require_none_after(folder: Path, step: int) -> None:
    """Refuse a folder with a complete checkpoint after the step at which a run starts.

    Raises:
        CheckpointError: there is one; the message names the last.
    """
    later = [path for path in checkpoints(folder) if step_of(path) > step and is_whole(path, quiet=True)]
    if later:
        raise CheckpointError(
            f"{folder} must hold no checkpoint after step {step}, at which this run starts; it has {later[-1].name} of another run. Give "
            "another folder, or remove that checkpoint."
        )


def _say_other_prompts(written: Path, loop: AlignmentLoop) -> None:
    """Say that a prompt file has changed: its path is the same, so that no configuration shows it. Older checkpoints do not know."""
    before, now = _facts_of(written).get("prompts"), listed(loop.prompts)
    if before and now and before != now and loop.devices.rank == 0:
        say(
            f"the prompts ({before['count']} of them, now {now['count']}) changed since the run began; the run continues with the present "
            "prompts"
        )


def _say_other_held_out(before: Sequence[str], loop: AlignmentLoop) -> None:
    """Say that a file of held-out prompts has changed since the last evaluation before a resume."""
    now = [[*map(str, result.prompts)] for result in loop.evaluations]
    if before and now and before not in now and loop.devices.rank == 0:
        say(
            f"the held-out prompts ({len(before)} of them, now {len(now[0])}) changed since the last evaluation; those from now on are not "
            "comparable with those before"
        )


def _evaluated_texts(folder: Path) -> list[str]:
    """Prompts of the last evaluation that a run folder has recorded; none if there is no record that can be read."""
    try:
        return [entry["prompt"] for entry in json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))[-1]["by_prompt"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _spares_weights(error: BaseException | None, loop: AlignmentLoop) -> bool:
    """True if weights have not moved since the last finished step, and all processes are here to save them.

    In one process that is so of any error before weights move. Several processes are all here after errors that they meet together; others
    may have come to one process alone.
    """
    if not loop.settled:
        return False
    return isinstance(error, Exception | KeyboardInterrupt if loop.devices.size == 1 else _SHARED)


def _rewards_of(written: Path) -> list[float]:
    """Rewards of the steps before a checkpoint, which it has recorded."""
    try:
        return [float(reward) for reward in _facts_of(written).get("rewards", [])]
    except FileNotFoundError:  # the run continues from a checkpoint in another folder
        return []


def _facts_of(written: Path) -> Mapping[str, Any]:
    """Manifest of a checkpoint whose files have been checked."""
    facts: Mapping[str, Any] = json.loads((written / "manifest.json").read_text(encoding="utf-8"))
    return facts
