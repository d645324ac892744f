"""Record of a run in its folder: configuration, environment, metrics, LoRA, report."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from ..config.sources import keep
from ..core import AlignmentLoop, Hook, Interrupted, Report, RewardError
from ..core.report import plain
from ..core.unessential import say, unessential
from ..durable import append_line, publish, write_whole
from ..evaluation import write_report
from ..evaluation.alarm import forget
from ..export import Card, export, pipeline_policy
from ..policies.arithmetic import enabled_kernels, tf32
from ..samplers import Branches
from ..threads import usable_cores

_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Versions, commit, device and arithmetic settings of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": _commit(Path(__file__)),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "attention_kernels": enabled_kernels(),
        "tf32": tf32(),
    }


def _commit(file: Path) -> str | None:
    """The commit that a file is checked out of; None where it is in no repository (an installed package), or there is no git."""
    for question in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
        try:
            answer = subprocess.run(["git", *question], cwd=file.parent, capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode:
            return None
    return answer.stdout.decode(errors="replace").strip() or None


@attrs.define(eq=False)
class Recorder(Hook):
    """Writes `config.yaml`, `environment.json`, `metrics.jsonl` (one line a step), and at the end `lora/` and `report.html`.

    What is written at the end is tried before the first step. Source files of the user's own parts are kept in `code/`, from which they are
    imported again when the folder is read.

    Args:
        folder: folder of the run
        config: resolved configuration; "" for a run that was composed in Python and has none
        name: title of the report
        sources: function that gives path below `code/` -> file, once all parts are built
    """

    folder: Path
    config: str = ""
    name: str = "run"
    sources: Callable[[], Mapping[str, Path]] = dict
    _began: float = attrs.field(init=False, default=0.0)
    _total: int = attrs.field(init=False, default=0)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._began, self._total = time.monotonic(), total
        if loop.devices.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config:
            write_whole(self.folder / "config.yaml", self.config)
        changed = keep(self.sources(), self.folder)
        if changed and step:
            say(f"{', '.join(changed)} changed since the run began; the run continues with the present files")
        inner = pipeline_policy(loop.evaluation_policy())
        with unessential(str(self.folder / "environment.json")):
            about = {**environment(), "attention": None if inner is None else inner.attention}
            write_whole(self.folder / "environment.json", json.dumps(about, indent=1))
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        done = [line for line in lines if _step_of(line) < step]  # a resumed run repeats the steps after its checkpoint
        write_whole(metrics, "".join(f"{line}\n" for line in done))
        if step == 0:
            forget(self.folder)
        if step < total:
            self._rehearse(loop, step)
            self._report.unlink(missing_ok=True)  # a report means that the run is finished

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if loop.devices.rank != 0:
            return
        ledger = report.ledger
        line = {
            "step": report.step,
            "elapsed": round(time.monotonic() - self._began, 3),
            **plain(report.metrics),
            "rows_per_second": round(sum(ledger.rows.values()) / max(sum(ledger.seconds.values()), 1e-9), 2),
            **{f"seconds/{stage}": round(seconds, 5) for stage, seconds in ledger.seconds.items()},
            **{f"hidden/{stage}": round(seconds, 5) for stage, seconds in ledger.hidden.items()},
            **{f"memory/{stage}_bytes": usage.peak for stage, usage in ledger.usage.items()},
            **{f"memory/{stage}_predicted_bytes": count for stage, count in ledger.predicted.items()},
            **{f"waits/{stage}": count for stage, count in ledger.waits.items()},
            **{f"rows/{entry}": rows for entry, rows in ledger.rows.items()},
            **{f"calls/{entry}": calls for entry, calls in ledger.calls.items()},
        }
        append_line(self.folder / "metrics.jsonl", json.dumps(line))

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        unevaluated = isinstance(error, RewardError) and 0 < step == self._total  # a reward failed when the training was done
        if error is not None and not isinstance(error, Interrupted) and not unevaluated:
            return
        if loop.devices.rank != 0:
            return
        self._publish(loop, step)
        if error is not None and step == self._total:  # the last evaluation is missing, and a report would say that nothing is
            return
        self._write_report()

    @property
    def _report(self) -> Path:
        return self.folder / "report.html"

    def _rehearse(self, loop: AlignmentLoop, step: int) -> None:
        """Write what is written at the end once before the first step, so that nothing is left to fail when the work is done."""
        trial = self.folder / "lora.tmp"
        try:
            self._export(loop, step, trial)
            self._write_report()
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def _publish(self, loop: AlignmentLoop, step: int) -> None:
        """Write `lora/`. The one of an earlier end of the run stays until the new one is complete."""
        trial = self.folder / "lora.tmp"
        try:
            self._export(loop, step, trial)
            if trial.exists():
                publish(trial, self.folder / "lora")
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def _export(self, loop: AlignmentLoop, step: int, folder: Path) -> None:
        policy = loop.evaluation_policy()
        inner = pipeline_policy(policy)
        if inner is not None and inner.adapters:
            card = Card()
            with unessential("what the model card says of the run"):
                card = _filled(Card.of_run(self.folder, step, _evaluated_role(loop)), loop)
            export(policy, folder, "diffusers", card)

    def _write_report(self) -> None:
        with unessential(f"{self._report} cannot be written"):
            write_report(self.folder, self.name)


def _filled(card: Card, loop: AlignmentLoop) -> Card:
    """Fill in what a folder without a config.yaml does not say: the parts of the loop itself."""
    tree = loop.sampler.branching() if isinstance(loop.sampler, Branches) else None
    return attrs.evolve(
        card,
        objective=card.objective or type(loop.objective).__name__,
        rewards=card.rewards or tuple(loop.named_rewards()),
        sampler=card.sampler or type(loop.sampler).__name__,
        sampled=card.sampled or (None if tree is None else len(tree.children)),
    )


def _evaluated_role(loop: AlignmentLoop) -> str:
    """Name under which a checkpoint holds the weights that are evaluated."""
    evaluated = loop.evaluation_policy()
    return next((name for name, policy in loop.policies().items() if policy is evaluated), "")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # a line cut off by a crash
        return float("inf")
