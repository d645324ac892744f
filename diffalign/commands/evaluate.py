"""Measure rewards and diversity of a run on fixed prompts and noise."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .measuring import SUBJECT, measuring_arguments

_EPILOG = "An interrupted evaluation continues where it stopped. Under accelerate launch or torchrun, processes share the prompts."


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help=SUBJECT)
    measuring_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of evaluation.json and images (RUN/evaluations/step-NNNNNN)")
    parser.epilog = _EPILOG


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..evaluation import Rounds, contact_sheet, evaluate
    from ..processes.devices import connect, disconnect
    from .subject import Measuring, Subject

    subject = Subject.of(options.run, overrides)
    devices = connect()
    try:
        measuring = Measuring.of(subject, options)
        loop, step = subject.build(devices)
        run = subject.folder or Path("runs") / subject.job.name
        folder = options.out or run / "evaluations" / f"step-{step:06d}"
        rounds = Rounds(folder / "rounds", f"{subject.identity} {options.reward}")
        policy = loop.evaluation_policy()
        result = evaluate(policy, measuring.prompts, measuring.rewards, step=step, devices=devices, rounds=rounds, **measuring.settings)
        if devices.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "evaluation.json").write_text(json.dumps({"run": subject.name, **result.summary()}, indent=1))
            contact_sheet(result.images, [str(prompt) for prompt in result.prompts]).save(folder / "images.png")
            print(f"{subject.name}, step {step}: {result.table()}\n{folder / 'evaluation.json'}")
        devices.barrier()  # the rounds are removed only when no process reads them any more
        rounds.clear()
    finally:
        disconnect(devices)
    return 0
