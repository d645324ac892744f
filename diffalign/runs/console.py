"""Progress on the console: a live line on a terminal, plain lines elsewhere."""

import time

import attrs
import torch
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..core import AlignmentLoop, Hook, Report
from ..core.unessential import unessential
from ..evaluation import paired_change

_FIELDS = (
    "reward {task.fields[reward]:.3f}  diversity {task.fields[diversity]:+.3f}  ratio check {task.fields[check]:.0e}  "
    "{task.fields[rows]:.0f} rows/s"
)


@attrs.define(eq=False)
class Console(Hook):
    """Shows step, reward, diversity (L-GMD), the first-step contract's deviation, network rows per second and the time left.

    Args:
        lines: number of plain lines that a run prints without a terminal
    """

    lines: int = 20
    _terminal: Terminal = attrs.field(factory=lambda: Terminal(highlight=False), init=False)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _task: int = attrs.field(default=0, init=False)
    _began: float = attrs.field(default=0.0, init=False)
    _first: int = attrs.field(default=0, init=False)
    _rows: int = attrs.field(default=0, init=False)

    def _say(self, line: str) -> None:
        with unessential("lines on the terminal"):
            self._terminal.print(line, soft_wrap=True, markup=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if loop.devices.rank != 0:
            return
        self._began, self._first = time.monotonic(), step
        threads = f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
        self._say(f"{type(loop.objective).__name__}: steps {step} to {total}, {loop.prompts_per_step} prompts a step, {threads}")
        for result in loop.evaluations[:1]:
            means = ", ".join(f"{name} {values.mean().item():.3f}" for name, values in result.rewards.items())
            self._say(f"held-out prompts before: {means}, diversity {result.measures()['diversity l_gmd'].mean().item():+.3f}")
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
            self._task = self._progress.add_task("run", total=total, completed=step, reward=0.0, diversity=0.0, check=0.0, rows=0.0)
            with unessential("progress on the terminal"):
                self._progress.start()

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if loop.devices.rank != 0:
            return
        self._rows += sum(report.ledger.rows.values())
        metrics, done = report.metrics, report.step + 1
        speed = self._rows / max(time.monotonic() - self._began, 1e-9)
        values = {
            "reward": metrics["reward"],
            "diversity": metrics["diversity/l_gmd"],
            "check": metrics.get("contract/deviation", 0.0),
            "rows": speed,
        }
        if self._progress is not None:
            with unessential("progress on the terminal"):
                self._progress.update(self._task, completed=done, **values)  # type: ignore[arg-type]
        elif done % max(1, report.total // self.lines) == 0 or done == report.total:
            left = seconds_left(time.monotonic() - self._began, self._first, done, report.total)
            self._say(
                f"step {done}/{report.total}  reward {values['reward']:.3f}  diversity {values['diversity']:+.3f}  "
                f"ratio check {values['check']:.0e}  {speed:.0f} rows/s  {left:.0f} s left"
            )

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if loop.devices.rank != 0:
            return
        if self._progress is not None:
            with unessential("progress on the terminal"):
                self._progress.stop()
        results = loop.evaluations
        if loop.folder is not None:
            self._say(f"run folder: {loop.folder}")
        if error is not None or len(results) < 2:
            return
        before, after = results[0].measures(), results[-1].measures()
        samples = results[-1].settings["samples"]
        self._say(
            f"held-out prompts ({len(results[-1].prompts)}, {samples} samples each), step {results[0].step} -> step {results[-1].step}, "
            "change [95 % interval]:"
        )
        labels = {name: "diversity (L-GMD)" if name == "diversity l_gmd" else name.removeprefix("reward ") for name in after}
        width = max(map(len, labels.values()))
        for name, values in after.items():
            change = paired_change(before[name], values)
            means = f"{before[name].mean().item():.3f} -> {values.mean().item():.3f}"
            self._say(f"  {labels[name]:<{width}} {means}   {change.signed()}")


def seconds_left(spent: float, first: int, done: int, total: int) -> float:
    """Time that the rest of a run takes at the speed so far of this process, which may have begun after a resume.

    Args:
        spent: seconds since step `first`
        first: the step that this process began with
        done: steps done, `first` included
        total: steps of the run
    """
    return spent / max(done - first, 1) * (total - done)
