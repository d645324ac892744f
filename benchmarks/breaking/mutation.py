"""Have the tests teeth? Plants a fault in a copy of the package, runs the tests that should see it, and says which did.

The faults are those of faults/*.toml: a sign, a sigma off by one, a missing stop-gradient, a wrong group. The working tree is never
touched. First all tests run on the copy without a fault; then each fault gets its tests, until the first that fails, in a process
of its own. A fault that Python itself refuses (SyntaxError, ImportError, NameError) is no fault and is reported as invalid.

Args:
    only: faults with this in their name, kind or file
    contracts: run the contracts of diffalign.testing on each fault, too
    json: also write the results here, after each fault; with --only, into those that it holds
"""

import collections
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.breaking.planted import Fault, copy_of_the_package, faults, with_fault
from benchmarks.record import write

LIMIT = 180
"""Seconds of a processor within which a fault must be caught: other programs on the machine do not lengthen them."""
PRELOADED = ["torch.distributed.tensor", "numpy.random", "hypothesis.strategies", "pytest", "safetensors.torch", "PIL.Image", "yaml"]
"""Imported once for all faults; the package itself never is."""
REFUSED = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError")


@attrs.frozen
class Outcome:
    """What came of some tests.

    Args:
        state: "passed", "failed", "refused" by Python itself, or "timeout"
        by: the first test that failed, and how
        wall: seconds
        cpu: seconds of a processor
    """

    state: str
    by: str
    wall: float
    cpu: float


class _Unshrunk:
    """A pytest plug-in: that an example fails is enough, it need not be the smallest."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("study", settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile("study")


def _child(copy: str, folder: str, arguments: Sequence[str], output: str, limit: int) -> None:
    """Run pytest on the copy, which is not imported yet, and leave what it says in a file."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    gc.freeze()  # pytest collects garbage several times, and there is none in what is imported
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": copy, "COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, copy)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:  # of the working tree
        del sys.modules[name]
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", *arguments], plugins=[_Unshrunk()])
    import diffalign

    assert str(diffalign.__file__).startswith(copy), diffalign.__file__
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\ncpu {mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime:.1f} code {int(code)}", flush=True)
    os._exit(int(code))


def examined(copy: Path, folder: Path, arguments: Sequence[str], limit: int) -> Outcome:
    """What pytest says of the copy, started in `folder`.

    Raises:
        RuntimeError: it could not run at all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
        start = time.monotonic()
        child = context.Process(target=_child, args=(str(copy), str(folder), list(arguments), output.name, limit))
        child.start()
        child.join(20 * limit)  # one that sleeps for ever uses no processor
        late = child.is_alive() or child.exitcode == -signal.SIGXCPU
        if child.is_alive():
            child.kill()
            child.join()
        wall, said = time.monotonic() - start, Path(output.name).read_text()
    if late:
        return Outcome("timeout", "", wall, float(limit))
    match = re.search(r"^cpu (\S+) code (\d+)$", said, re.MULTILINE)
    if match is None or int(match[2]) not in (0, 1, 2):
        raise RuntimeError(f"pytest {' '.join(arguments)} could not run:\n{said[-3000:]}")
    failure = re.search(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE)
    by = failure[1] if failure else ""
    refused = any(f" {name}:" in f" {by}".replace(" - ", " ") for name in REFUSED) or int(match[2]) == 2
    state = "passed" if int(match[2]) == 0 else "refused" if refused else "failed"
    return Outcome(state, by[:240], wall, float(match[1]))


def contract_arguments(part: str) -> list[str]:
    """Of pytest, for the contract of a part."""
    return ["--diffalign", part, *(["-k", "not learns"] if part.endswith(":distillation") else [])]


def study(copy: Path, empty: Path, fault: Fault, contracts: bool) -> dict[str, Any]:
    """One fault: is it caught, by what, how soon."""
    row = {"name": fault.name, "kind": fault.kind, "file": fault.file}
    with with_fault(copy, fault):
        outcome = examined(copy, copy, fault.tests, LIMIT)
        states = {"failed": "caught", "refused": "invalid", "passed": "equivalent" if fault.equivalent else "survived"}
        row |= {"state": states.get(outcome.state, outcome.state), "by": outcome.by, "wall": round(outcome.wall, 1), "cpu": outcome.cpu}
        if fault.equivalent:
            row["reason"] = fault.equivalent
        if contracts:
            row["contract"] = ""
            for part in fault.contracts:
                found = examined(copy, empty, contract_arguments(part), LIMIT)
                if found.state == "failed":
                    row["contract"] = found.by.partition(" - ")[0]
                    break
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by state, the share that is caught, and what the contracts alone see."""
    counts = collections.Counter(row["state"] for row in rows)
    asked = [row for row in rows if "contract" in row and row["state"] == "caught"]
    seen = {"seen by contracts": f"{sum(bool(row['contract']) for row in asked)} of {len(asked)} caught"} if asked else {}
    return {
        "faults": len(rows),
        **counts,
        "share": round(counts["caught"] / max(1, len(rows)), 4),
        "slowest": max((row["cpu"] for row in rows), default=0.0),
        "cpu": round(sum(row["cpu"] for row in rows), 1),
        **seen,
    }


def main(only: str = "", contracts: bool = False, json: Path | None = None) -> int:
    chosen = [fault for fault in faults() if any(only in text for text in (fault.name, fault.kind, fault.file))]
    if not chosen:
        raise SystemExit(f"--only {only!r}: no fault has this in its name, kind or file")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy, empty = Path(folder) / "copy", Path(folder) / "empty"
        empty.mkdir()
        copy_of_the_package(copy)
        for fault in chosen:  # a list that is older than the package is found before hours are spent
            fault.planted((copy / fault.file).read_text())
        tests = sorted({test for fault in chosen for test in fault.tests})
        parts = sorted({part for fault in chosen for part in fault.contracts}) if contracts else []
        for where, options in [(copy, tests), *((empty, contract_arguments(part)) for part in parts)]:
            outcome = examined(copy, where, options, 10 * LIMIT)
            print(f"{outcome.state} without a fault: {' '.join(options)} ({outcome.wall:.0f} s, {outcome.cpu:.0f} s cpu)", flush=True)
            if outcome.state != "passed":
                print(f"the tests must pass before a fault is planted; {outcome.by}")
                return 1
        for fault in chosen:
            rows.append(study(copy, empty, fault, contracts))
            row = rows[-1]
            by = " | ".join(text for text in (row["by"], row.get("contract", ""), row.get("reason", "")) if text)
            print(f"{row['state']:10} {row['wall']:5.1f} s {row['cpu']:5.1f} s cpu  {row['name']}: {by[:150]}", flush=True)
            if json is not None:
                _record(json, rows, merge=bool(only))
    print(", ".join(f"{name} {value}" for name, value in summary(rows).items()))
    return 0


def _record(file: Path, rows: Sequence[dict[str, Any]], merge: bool) -> None:
    """Write the results, those of other faults kept if they are to be merged, in the order of the lists."""
    known = json.loads(file.read_text())["faults"] if merge and file.exists() else []
    merged = {row["name"]: row for row in [*known, *rows]}
    rows = [merged[fault.name] for fault in faults() if fault.name in merged]
    write(file, {"summary": summary(rows), "faults": rows})
