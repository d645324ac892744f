"""Costs of a run: network rows and calls by role, seconds by stage, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
import torch

from .errors import PeerFailed
from .policy import Policy


@attrs.define
class Ledger:
    """Adds up the costs of each stage of a step.

    Args:
        seconds: by stage (encode, rollout, decode, reward, replay, update)
        rows: network rows by "role/stage"
        calls: network calls by "role/stage"
        failed: stage in which an error was raised; None if there was none
        hidden: seconds by stage that ran at the same time as another stage; they are not part of `seconds`
    """

    seconds: dict[str, float] = attrs.field(factory=dict)
    rows: dict[str, int] = attrs.field(factory=dict)
    calls: dict[str, int] = attrs.field(factory=dict)
    failed: str | None = None
    hidden: dict[str, float] = attrs.field(factory=dict)

    @contextmanager
    def stage(self, name: str, roles: Mapping[str, Policy] | None = None) -> Iterator[None]:
        """Charge the block to a stage, and its network rows to `roles`. A counter that two roles share is charged once."""
        counters = {id(policy.counter): (role, policy.counter) for role, policy in reversed(list((roles or {}).items()))}
        before = {key: (counter.rows, counter.calls) for key, (_, counter) in counters.items()}
        start = time.perf_counter()
        try:
            yield
        except PeerFailed:  # the stage that failed is another process's
            raise
        except BaseException:
            self.failed = name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            for key, (role, counter) in counters.items():
                rows, calls = counter.rows - before[key][0], counter.calls - before[key][1]
                if calls:
                    entry = f"{role}/{name}"
                    self.rows[entry] = self.rows.get(entry, 0) + rows
                    self.calls[entry] = self.calls.get(entry, 0) + calls

    def hide(self, name: str, seconds: float) -> None:
        """Add time that a stage took while the step was busy with another stage."""
        self.hidden[name] = self.hidden.get(name, 0.0) + seconds

    def add(self, other: "Ledger") -> None:
        """Add another ledger's numbers to this one."""
        for name in ("seconds", "hidden", "rows", "calls"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value


def peak_memory() -> int:
    """Peak memory in bytes: of the current accelerator where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
