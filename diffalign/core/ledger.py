"""Costs of a run: network rows and calls by role, seconds by stage, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
import torch

from .errors import PeerFailed
from .host_waits import HostWaits, waits_at
from .memory import DeviceMemory, Usage, current_memory
from .policy import Policy
from .processes import Devices, gather_texts


def memory_here() -> DeviceMemory | None:
    """Memory of the current accelerator; None where there is none."""
    return current_memory()


@attrs.define
class Ledger:
    """Adds up the costs of each stage of a step.

    Args:
        seconds: by stage (encode, rollout, decode, reward, replay, update)
        rows: network rows by "role/stage"
        calls: network calls by "role/stage"
        failed: stage in which an error was raised; None if there was none
        hidden: seconds by stage that ran at the same time as another stage; they are not part of `seconds`
        tracked: network rows by "role/stage" whose calls ran with autograd on; they are part of `rows`
        usage: memory by stage, of its block that took most; empty without an accelerator. Stages do not lie inside each other
        predicted: peak of a stage in bytes that was expected from the steps before; empty where nobody foretells it
        waits: waits of the host for the device, by stage; empty where they are not counted
        memory: counters of the device's memory; None reads nothing. By default those of the current accelerator
        waiting: counter of the waits; None counts nothing
    """

    seconds: dict[str, float] = attrs.field(factory=dict)
    rows: dict[str, int] = attrs.field(factory=dict)
    calls: dict[str, int] = attrs.field(factory=dict)
    failed: str | None = None
    hidden: dict[str, float] = attrs.field(factory=dict)
    tracked: dict[str, int] = attrs.field(factory=dict)
    usage: dict[str, Usage] = attrs.field(factory=dict)
    predicted: dict[str, int] = attrs.field(factory=dict)
    waits: dict[str, int] = attrs.field(factory=dict)
    memory: DeviceMemory | None = attrs.field(factory=memory_here, eq=False, repr=False)
    waiting: HostWaits | None = attrs.field(default=None, eq=False, repr=False)

    @classmethod
    def of(cls, step: int) -> "Ledger":
        """Begin the ledger of a step. The waits are counted at one step of a hundred (`waits_at`)."""
        return cls(waiting=waits_at(step))

    @contextmanager
    def stage(self, name: str, roles: Mapping[str, Policy] | None = None) -> Iterator[None]:
        """Charge the block to a stage, and its network rows to `roles`. A counter that two roles share is charged once."""
        counters = {id(policy.counter): (role, policy.counter) for role, policy in reversed(list((roles or {}).items()))}
        before = {key: (counter.rows, counter.calls, counter.tracked) for key, (_, counter) in counters.items()}
        room = None if self.memory is None else (self.memory.used(), self.memory.free())
        if self.memory is not None:
            self.memory.begin()
        start = time.perf_counter()
        try:
            with self._waits_of(name):
                yield
        except PeerFailed:  # the stage that failed is another process's
            raise
        except BaseException:
            self.failed = name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self.memory is not None and room is not None:
                largest = max((counter.largest for _, counter in counters.values()), default=0)
                self._keep(name, Usage(*room, self.memory.peak(), largest))
            for key, (role, counter) in counters.items():
                rows, calls = counter.rows - before[key][0], counter.calls - before[key][1]
                if calls:
                    entry = f"{role}/{name}"
                    self.rows[entry] = self.rows.get(entry, 0) + rows
                    self.calls[entry] = self.calls.get(entry, 0) + calls
                    self.tracked[entry] = self.tracked.get(entry, 0) + counter.tracked - before[key][2]

    @contextmanager
    def _waits_of(self, name: str) -> Iterator[None]:
        if self.waiting is None:
            yield
            return
        before = self.waiting.count
        try:
            with self.waiting.counting():
                yield
        finally:
            self.waits[name] = self.waits.get(name, 0) + self.waiting.count - before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count no waits in the block: other threads run meanwhile, and the warnings by which waits are counted belong to all threads."""
        kept, self.waiting = self.waiting, None
        try:
            yield
        finally:
            self.waiting = kept

    def _keep(self, name: str, usage: Usage) -> None:
        if name not in self.usage or self.usage[name].grown < usage.grown:
            self.usage[name] = usage

    def hide(self, name: str, seconds: float) -> None:
        """Add time that a stage took while the step was busy with another stage."""
        self.hidden[name] = self.hidden.get(name, 0.0) + seconds

    def over(self, devices: Devices) -> "Ledger":
        """Sum the network rows and calls over the processes of a run; the rest stays that of this process. All must call this together."""
        if devices.size == 1:
            return self
        entries = list(dict.fromkeys(entry for text in gather_texts(devices, "\n".join(self.rows)) for entry in text.splitlines()))
        counts = torch.tensor([[table.get(entry, 0) for entry in entries] for table in (self.rows, self.calls, self.tracked)])
        rows, calls, tracked = (dict(zip(entries, numbers, strict=True)) for numbers in devices.sum(counts).tolist())
        return attrs.evolve(self, rows=rows, calls=calls, tracked=tracked)

    def add(self, other: "Ledger") -> None:
        """Add another ledger's numbers to this one."""
        for name in ("seconds", "hidden", "rows", "calls", "tracked", "waits"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value
        for name, usage in other.usage.items():
            self._keep(name, usage)


def peak_memory() -> int:
    """Peak memory in bytes: of the current accelerator where there is one, else of the process."""
    if (memory := current_memory()) is not None:
        return memory.highest()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
