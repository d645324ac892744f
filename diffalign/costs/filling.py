"""Row budgets that fill the memory of an accelerator."""

import attrs
import torch

from ..core import AlignmentLoop, Hook, Report
from ..core.budget import has_rows, limited, rows_of
from ..core.guided import evaluations
from ..core.memory import DeviceMemory, Usage
from ..core.unessential import say
from .activations import largest_size
from .sizes import activation_bytes, size

_UNKNOWN = 4
"""Rows of the first calls of a network whose activations the planner cannot estimate."""

_MOST = 16
"""Rows of the first calls at most: the first step measures, it need not be fast."""

_NAMES = {"rollout": "sampler.rows", "update": "objective.rows", "decode": "chunk"}


@attrs.define(eq=False)
class Filling(Hook):
    """Lets rollout, update and decoding compute as many rows at once as the memory of the accelerator holds.

        rows <- min(share * free / bytes of a row, growth * rows)
        bytes of a row = (peak of the stage - bytes in use before it) / rows of its largest call

    The first step takes few rows, after the planner's estimate; each step corrects the bytes of a row by what it has seen. A budget grows
    only while calls use it up. Memory that runs out halves a budget as ever, and it then stays there. All processes take the same rows,
    those of the fullest device.

    Only what is left open is filled: `rows` of sampler and objective that are None, and if one is, images up to the loop's `chunk`. Without
    an accelerator nothing changes. Results do not depend on budgets, but their last bits do, where a device rounds by the shape of a call.
    Checkpoints hold the budgets, so a resumed run keeps those that it had found. A run that must repeat to the bit needs given `rows`.

    Args:
        share: share of the free memory that a stage may take
        growth: factor by which a budget grows at most in a step
        sharded: share where weights are sharded: memory that runs out there ends the run
    """

    share: float = attrs.field(default=0.85, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])
    growth: float = attrs.field(default=4.0, validator=attrs.validators.gt(1))
    sharded: float = attrs.field(default=0.7, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])
    _open: tuple[str, ...] = attrs.field(default=(), init=False)
    _most: dict[str, int] = attrs.field(factory=dict, init=False)
    _set: dict[str, int] = attrs.field(factory=dict, init=False)
    _row: dict[str, float] = attrs.field(factory=dict, init=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._open, self._most, self._set, self._row = (), {}, {}, {}
        memory, parts = loop.ledger.memory, {"rollout": loop.sampler, "update": loop.objective}
        unlimited = [stage for stage, part in parts.items() if has_rows(part) and rows_of(part) is None]
        if memory is None or not unlimited:
            return
        self._open, self._most = (*unlimited, "decode"), {"decode": loop.chunk}
        first = self._first(loop, memory)
        self._take(loop, {stage: min(first, self._most.get(stage, first)) for stage in self._open})

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if not self._open:
            return
        now = _budgets(loop)
        for stage in self._open:
            if now[stage] < self._set[stage]:  # it was halved
                self._most[stage] = now[stage]
        calls = {stage: self._call(stage, loop, report) for stage in self._open}
        for stage, usage in calls.items():
            if usage is not None and stage in self._row:
                report.ledger.predicted[stage] = round(usage.before + self._row[stage] * usage.rows)
        fits = [now[stage] if usage is None else self._fit(loop, usage) for stage, usage in calls.items()]
        used_up = [usage is not None and usage.rows >= now[stage] for stage, usage in calls.items()]
        shared = loop.devices.maximum(torch.tensor([[-rows for rows in fits], [int(full) for full in used_up]]))
        self._row |= {stage: usage.grown / usage.rows for stage, usage in calls.items() if usage is not None}
        wanted = {}
        for stage, least, full in zip(self._open, (-shared[0]).tolist(), shared[1].tolist(), strict=True):
            rows = min(int(least), int(self.growth * now[stage]), self._most.get(stage, int(least)))
            if full and rows > now[stage]:
                wanted[stage] = rows
        self._take(loop, {stage: wanted.get(stage, now[stage]) for stage in self._open})
        if wanted and loop.devices.rank == 0:
            say(f"step {report.step}: {', '.join(self._said(stage, rows, calls[stage]) for stage, rows in wanted.items())}")

    def _first(self, loop: AlignmentLoop, memory: DeviceMemory) -> int:
        policy = loop.objective.policy
        guess = evaluations(policy) * activation_bytes(policy.sized(largest_size(loop, policy)))
        free = memory.free()
        if guess > free and loop.devices.rank == 0:
            say(
                f"one row of the update needs about {size(guess)} for its activations, and {size(free)} are free on the device. If memory "
                "runs out: --policy.checkpointing true, a smaller --policy.resolution, or --shard over more devices."
            )
        first = int(self.share * free / (4 * guess)) if guess else _UNKNOWN  # the estimate leaves most kinds of activations out
        rows = -int(loop.devices.maximum(torch.tensor([-max(1, min(first, _MOST))]))[0])
        if guess:
            self._row["update"] = float(guess)
        return rows

    def _call(self, stage: str, loop: AlignmentLoop, report: Report) -> Usage | None:
        """Memory of a stage with the rows of its largest call; None if it has not run."""
        usage = report.ledger.usage.get(stage)
        if usage is None:
            return None
        rows = min(loop.chunk, len(report.batch.trajectories.samples)) if stage == "decode" else usage.rows
        return attrs.evolve(usage, rows=rows) if rows else None

    def _fit(self, loop: AlignmentLoop, usage: Usage) -> int:
        share = self.share if loop.sharding is None else self.sharded
        return max(1, int(share * usage.free * usage.rows / max(usage.grown, 1)))

    def _take(self, loop: AlignmentLoop, budgets: dict[str, int]) -> None:
        if "rollout" in budgets:
            loop.sampler = limited(loop.sampler, budgets["rollout"])
        if "update" in budgets:
            limited(loop.objective, budgets["update"])
        loop.chunk = budgets["decode"]
        self._set = budgets

    def _said(self, stage: str, rows: int, usage: Usage | None) -> str:
        name = f"{_NAMES[stage]} is {rows}"
        return name if usage is None else f"{name} ({size(usage.grown / usage.rows)} a row in the {stage}, {size(usage.free)} free)"


def _budgets(loop: AlignmentLoop) -> dict[str, int]:
    every = {"rollout": rows_of(loop.sampler), "update": rows_of(loop.objective), "decode": loop.chunk}
    return {stage: rows for stage, rows in every.items() if rows is not None}
