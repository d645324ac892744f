"""Measure rewards and diversity of a run on fixed prompts and noise."""

import argparse
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .measuring import SUBJECT, measuring_arguments
from .suites import SUITES

if TYPE_CHECKING:
    from .subject import Measuring, Subject

_SUITE = (
    "prompts and rewards of a benchmark in place of the run's own, and a table by tag; --prompts takes other prompts of the same form, "
    "--reward NAME=PART a reward in place of the suite's of that name"
)
_EPILOG = "An interrupted evaluation continues where it stopped. Under accelerate launch or torchrun, processes share the prompts."


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help=SUBJECT)
    measuring_arguments(parser)
    parser.add_argument("--suite", choices=SUITES, help=_SUITE)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of evaluation.json and images (RUN/evaluations/step-NNNNNN)")
    parser.epilog = _EPILOG


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..core.unessential import unessential
    from ..evaluation import ByTag, Rounds, contact_sheet, evaluate
    from ..processes.devices import connect, disconnect
    from ..runs.folder import require_writable
    from .subject import Measuring, Subject

    suite = SUITES.get(options.suite)
    subject = Subject.of(options.run, overrides).measured_on(options.prompts or (suite.prompts if suite else None))
    run = subject.folder or Path("runs") / subject.job.name
    require_writable(options.out or run / "evaluations", "--out")
    devices = connect()
    try:
        measuring = Measuring.of(subject, options, suite)
        loop, step = subject.build(devices)
        folder = options.out or run / "evaluations" / f"step-{step:06d}{'' if suite is None else f'-{options.suite}'}"
        rounds = Rounds(folder / "rounds", _identity(subject, measuring, options))
        policy = loop.evaluation_policy()
        result = evaluate(policy, measuring.prompts, measuring.rewards, step=step, devices=devices, rounds=rounds, **measuring.settings)
        if devices.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            tags = None if suite is None else ByTag.of(result)
            found = {"run": subject.name, **result.summary()} | ({} if tags is None else {"suite": {"name": options.suite, **tags.plain()}})
            (folder / "evaluation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            with unessential(str(folder / "images.png")):
                contact_sheet(result.images, [str(prompt) for prompt in result.prompts]).save(folder / "images.png")
            print(f"{subject.name}, step {step}: {result.table()}")
            for name in measuring.rewards:
                if name not in result.rewards:
                    print(f"No prompt was scored by the reward {name}: it has no number.")
            if tags is not None:
                print(f"suite {options.suite}, mean [95 % interval over prompts]\n{tags.table()}")
            print(folder / "evaluation.json")
        devices.barrier()  # the rounds are removed only when no process reads them any more
        rounds.clear()
    finally:
        disconnect(devices)
    return 0


def _identity(subject: "Subject", measuring: "Measuring", options: argparse.Namespace) -> str:
    """Say what finished rounds depend on: the weights, the configuration, the command line, and the source files of own parts."""
    from ..config.sources import sources

    further = [*measuring.further.values(), *measuring.settings["features"].values()]
    modules = [module.__name__ for part in further if (module := inspect.getmodule(part)) is not None]
    files = {**subject.job.sources(), **sources(modules)}
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files.values())).hexdigest()
    return f"{subject.identity} {options.reward} {options.suite} {code}"
