"""Progress on the console: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..core import AlignmentLoop, Evaluated, Hook, Listed, Report
from ..core.unessential import unessential
from ..costs.utilisation import ROLLOUT, UPDATE
from ..evaluation import Evaluation, paired_change
from ..evaluation.pairing import Column, fewer, over, paired

_FIELDS = (
    "reward {task.fields[reward]}  diversity {task.fields[diversity]}  ratio check {task.fields[check]}  "
    "{task.fields[rows]} rows/s{task.fields[peak]}"
)
_FORMATS = {"reward": ".3f", "diversity": "+.3f", "check": ".0e", "rows": ".0f"}
UNKNOWN = "-"
"""Text in place of a number that is not known yet, or not measured."""


def _nothing() -> dict[str, Any]:
    """Fields of the progress bar before the first step."""
    return {**dict.fromkeys(_FORMATS, UNKNOWN), "peak": ""}


@attrs.define(eq=False)
class Console(Hook):
    """Shows step, reward, diversity (L-GMD), the first-step contract's deviation, network rows per second and the time left.

    Most steps have no deviation of their own, because the contract is checked at some steps only. They show the last one.

    Args:
        lines: number of plain lines that a run prints without a terminal
        stderr: prints to stderr instead of stdout
    """

    lines: int = 20
    stderr: bool = False
    _terminal: Terminal = attrs.field(init=False)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _task: int = attrs.field(default=0, init=False)
    _began: float = attrs.field(default=0.0, init=False)
    _first: int = attrs.field(default=0, init=False)
    _rows: int = attrs.field(default=0, init=False)
    _told: int = attrs.field(default=0, init=False)  # evaluations that were printed
    _deviation: float | None = attrs.field(default=None, init=False)  # of the last check of the contract

    def __attrs_post_init__(self) -> None:
        self._terminal = Terminal(highlight=False, stderr=self.stderr)

    def _say(self, line: str) -> None:
        with unessential("lines on the terminal"):
            self._terminal.print(line, soft_wrap=True, markup=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if loop.devices.rank != 0:
            return
        self._began, self._first, self._told, self._deviation, self._rows = time.monotonic(), step, 0, None, 0
        threads = f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
        self._say(f"{type(loop.objective).__name__}: steps {step} to {total}, {loop.prompts_per_step} prompts a step, {threads}")
        self._say_evaluations(loop)
        if self._terminal.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(20),
                TextColumn(_FIELDS),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._terminal)
            self._task = self._progress.add_task("run", total=total, completed=step, **_nothing())
            with unessential("progress on the terminal"):
                self._progress.start()

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if loop.devices.rank != 0:
            return
        self._rows += sum(report.ledger.rows.values())
        metrics, done = report.metrics, report.step + 1
        self._deviation = metrics.get("contract/deviation", self._deviation)
        speed = self._rows / max(time.monotonic() - self._began, 1e-9)
        numbers = {
            "reward": metrics.get("reward"),
            "diversity": metrics.get("diversity/l_gmd"),
            "check": self._deviation,
            "rows": speed,
        }
        values = {name: UNKNOWN if number is None else format(number, _FORMATS[name]) for name, number in numbers.items()}
        if self._progress is not None:
            with unessential("progress on the terminal"):
                self._progress.update(self._task, completed=done, peak=_of_peak(metrics), **values)  # type: ignore[arg-type]
        elif done % max(1, report.total // self.lines) == 0 or done == report.total:
            left = seconds_left(time.monotonic() - self._began, self._first, done, report.total)
            self._say(
                f"step {done}/{report.total}  reward {values['reward']}  diversity {values['diversity']}  "
                f"ratio check {values['check']}  {values['rows']} rows/s{_of_peak(metrics)}  {left:.0f} s left"
            )
        self._say_evaluations(loop)

    def _say_evaluations(self, loop: AlignmentLoop) -> None:
        """Print the evaluations that have come since the last call."""
        for result in loop.evaluations[self._told :]:
            means = [f"{name} {values.mean().item():.3f}" for name, values in result.rewards.items()]
            means += [f"diversity {result.measures()['diversity l_gmd'].mean().item():+.3f}"]
            self._say(f"held-out prompts {f'at step {result.step}' if result.step else 'before'}: {', '.join(means)}")
        if loop.evaluations and not self._told and (trained := _trained(loop, loop.evaluations[0])):
            count = len(loop.evaluations[0].prompts)
            self._say(f"  {trained} of these {count} prompts are trained on as well, so they say little about other prompts")
        self._told = len(loop.evaluations)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if loop.devices.rank != 0:
            return
        if self._progress is not None:
            with unessential("progress on the terminal"):
                self._progress.stop()
        if loop.folder is not None:
            self._say(f"run folder: {loop.folder}")
        results = [result for result in loop.evaluations if _comparable(result, loop.evaluations[-1])]
        if error is None and len(results) > 1:
            self._say_changes(results[0], results[-1])

    def _say_changes(self, first: Evaluated, last: Evaluated) -> None:
        samples = last.settings["samples"]
        whole = "; this process began there, the report has the whole run" if first.step else ""
        self._say(
            f"held-out prompts ({len(last.prompts)}, {samples} samples each), step {first.step} -> step {last.step}, "
            f"change [95 % interval]{whole}:"
        )
        columns = _columns(last)
        pairs = paired([columns, _columns(first)])
        few = fewer(pairs, len(last.prompts))
        short = {name: "diversity (L-GMD)" if name == "diversity l_gmd" else name.removeprefix("reward ") for name in columns}
        labels = {name: label + over(name, few) for name, label in short.items()}
        width = max(map(len, labels.values()))
        for name, label in labels.items():
            if name not in pairs:
                self._say(f"  {label:<{width}} - -> {columns[name].values.mean().item():.3f}   no prompt was scored in both")
                continue
            after, before = pairs[name]
            means = f"{before.mean().item():.3f} -> {after.mean().item():.3f}"
            self._say(f"  {label:<{width}} {means}   {paired_change(before, after).signed()}")


def _trained(loop: AlignmentLoop, result: Evaluated) -> int:
    """Number of evaluated prompts that the run also trains on; 0 if the source of prompts has no list."""
    known = set(map(str, loop.prompts.prompts)) if isinstance(loop.prompts, Listed) else set()
    return sum(str(prompt) in known for prompt in result.prompts)


def _comparable(one: Evaluated, other: Evaluated) -> bool:
    """True if two evaluations can be compared prompt by prompt."""
    return [*one.prompts] == [*other.prompts] and one.settings == other.settings


def _columns(result: Evaluated) -> Mapping[str, Column]:
    """Numbers by prompt of every measure. A result of another class has one for every prompt."""
    if isinstance(result, Evaluation):
        return result.columns()
    return {name: Column(torch.arange(len(values)), values) for name, values in result.measures().items()}


def _of_peak(metrics: Mapping[str, float]) -> str:
    """Text of the share of the device's peak; empty if it is not measured."""
    shares = [f"{metrics[name]:.0%}" for name in (ROLLOUT, UPDATE) if name in metrics]
    return f"  of peak {' / '.join(shares)}" if shares else ""


def seconds_left(spent: float, first: int, done: int, total: int) -> float:
    """Time that the rest of a run takes at the speed so far of this process, which may have begun after a resume.

    Args:
        spent: seconds since step `first`
        first: the step that this process began with
        done: steps done, `first` included
        total: steps of the run
    """
    return spent / max(done - first, 1) * (total - done)
