"""Train, and write a run folder."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import run_argument, say

if TYPE_CHECKING:
    from ..config import Run

_FILES = ("metrics.jsonl", "config.yaml", "environment.json", "evaluation.json", "report.html", "images", "lora", "best")


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config

    job = config.parse(options.run, overrides)
    _require_new(job, options)
    from ..checkpoint import Checkpoints
    from ..console import Console
    from ..recording import Recorder

    text, total = job.yaml(), int(job.tree["total"])
    checkpoints = Checkpoints(job.folder, job.tree["checkpoint_every"], text)
    loop = job.build((Recorder(job.folder, text, job.name), checkpoints, Console()))
    start = checkpoints.restore(loop) if options.resume else 0
    if start >= total:
        return say(f"{job.folder} has done {start} of {total} steps; nothing is left to do. Give a larger --total to go on.", 0)
    if options.overwrite and not options.resume:
        _clear(job.folder)
    try:
        loop.run(total, start)
    except KeyboardInterrupt:
        saved = sorted(job.folder.glob("step-??????"))
        if not saved:
            return say(f"interrupted; there is no checkpoint in {job.folder} yet", 130)
        again = f"diffalign train {options.run} --resume"
        return say(f"interrupted; the last checkpoint is {saved[-1]}. Go on, with the same --key values, by: {again}", 130)
    return 0


def _require_new(run: "Run", options: argparse.Namespace) -> None:
    from ..core import ConfigError

    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: one keeps what the run folder holds, the other does not")
    if run.folder.exists() and not run.folder.is_dir():
        raise ConfigError(f"folder {run.folder} must be a folder; it is a file. Give another --folder.")
    if (run.folder / "metrics.jsonl").exists() and not (options.resume or options.overwrite):
        raise ConfigError(
            f"folder {run.folder} must not hold another run; it has a metrics.jsonl. Give --resume to go on from its last checkpoint, "
            "--overwrite to replace it, or another --folder."
        )


def _clear(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for path in [*(folder / name for name in _FILES), *folder.glob("step-??????")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
