"""Progress on the terminal: a live line where there is one, plain lines elsewhere."""

import time

import attrs
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .core import AlignmentLoop, Hook, Report
from .evaluation import HeldOutEvaluation, paired_change

_FIELDS = (
    "reward {task.fields[reward]:.3f}  diversity {task.fields[diversity]:+.3f}  ratio check {task.fields[check]:.0e}  "
    "{task.fields[rows]:.0f} rows/s"
)


@attrs.define(eq=False)
class Console(Hook):
    """Shows step, reward, diversity (L-GMD), the first-step contract's deviation, network rows per second and the time left.

    Args:
        lines: how many plain lines a run prints where there is no terminal
    """

    lines: int = 20
    _terminal: Terminal = attrs.field(factory=lambda: Terminal(highlight=False), init=False)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _task: int = attrs.field(default=0, init=False)
    _began: float = attrs.field(default=0.0, init=False)
    _rows: int = attrs.field(default=0, init=False)

    def _say(self, line: str) -> None:
        self._terminal.print(line, soft_wrap=True, markup=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._began = time.time()
        self._say(f"{type(loop.objective).__name__}: steps {step} to {total}, {loop.prompts_per_step} prompts a step")
        for result in _evaluations(loop)[:1]:
            means = ", ".join(f"{name} {values.mean().item():.3f}" for name, values in result.rewards.items())
            self._say(f"held-out prompts before: {means}, diversity {result.l_gmd.mean().item():+.3f}")
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
            self._progress.start()

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        self._rows += sum(report.ledger.rows.values())
        metrics, done = report.metrics, report.step + 1
        speed = self._rows / max(time.time() - self._began, 1e-9)
        values = {
            "reward": metrics["reward"],
            "diversity": metrics["diversity/l_gmd"],
            "check": metrics.get("contract/deviation", 0.0),
            "rows": speed,
        }
        if self._progress is not None:
            self._progress.update(self._task, completed=done, **values)  # type: ignore[arg-type]
        elif done % max(1, report.total // self.lines) == 0 or done == report.total:
            left = (time.time() - self._began) / max(done, 1) * (report.total - done)
            self._say(
                f"step {done}/{report.total}  reward {values['reward']:.3f}  diversity {values['diversity']:+.3f}  "
                f"ratio check {values['check']:.0e}  {speed:.0f} rows/s  {left:.0f} s left"
            )

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        results = _evaluations(loop)
        if loop.folder is not None:
            self._say(f"run folder: {loop.folder}")
        if error is not None or len(results) < 2:
            return
        before, after = results[0], results[-1]
        self._say(f"held-out prompts ({len(after.prompts)}, {after.images.shape[1]} samples each), before -> after:")
        for name, values in after.rewards.items():
            change, half = paired_change(before.rewards[name], values)
            self._say(f"  {name:<22} {before.rewards[name].mean().item():.3f} -> {values.mean().item():.3f}   {change:+.3f} +- {half:.3f}")
        change, half = paired_change(before.l_gmd, after.l_gmd)
        self._say(
            f"  {'diversity (L-GMD)':<22} {before.l_gmd.mean().item():.3f} -> {after.l_gmd.mean().item():.3f}   {change:+.3f} +- {half:.3f}"
        )


def _evaluations(loop: AlignmentLoop) -> list:  # type: ignore[type-arg]
    return [result for hook in loop.hooks if isinstance(hook, HeldOutEvaluation) for result in hook.results]
