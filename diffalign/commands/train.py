"""Train, and write a run folder."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import positive_real, run_argument, say

if TYPE_CHECKING:
    from ..config import Run
    from ..core import AlignmentLoop, Devices
    from ..runs.checkpoints import Checkpoints
    from ..runs.lock import FolderLock


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the run folder")
    parser.add_argument("--new-total", action="store_true", help="with --resume: accept another total; schedules then use the new total")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument(
        "--teraflops",
        type=positive_real,
        metavar="N",
        help="peak speed of a device in TFLOP/s, for the metrics mfu/*; known for usual GPUs",
    )
    parser.add_argument("--open", action="store_true", help="open the page of a run that asks people for votes in the browser")
    parser.add_argument(
        "--fixed-rows", action="store_true", help="keep row budgets as they are given; else those that are null fill the memory of a GPU"
    )
    parser.add_argument("--shard", action="store_true", help="shard the weights over the processes of the launcher")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config

    job = config.parse(options.run, overrides)
    _require_new(job, options)
    from ..processes.devices import connect, described, disconnect
    from ..runs.folder import require_writable
    from ..runs.lock import FolderLock

    devices = connect()
    try:
        if devices.rank == 0:
            require_writable(job.folder)
            if text := described(devices, job.tree["prompts_per_step"]):
                say(f"in force: {text}", 0)
        with FolderLock(job.folder, devices) as lock:
            lock.take(create=False)  # before a model is loaded beside that of a run which trains there
            return _train(job, options, overrides, devices, lock)
    finally:
        disconnect(devices)


def _train(job: "Run", options: argparse.Namespace, overrides: Sequence[str], devices: "Devices", lock: "FolderLock") -> int:
    from ..config.sources import forget
    from ..core import NonFiniteError, RewardError
    from ..core.errors import reword
    from ..costs.filling import Filling
    from ..costs.utilisation import meter_of
    from ..processes.sharding import FullySharded
    from ..runs.checkpoints import Checkpoints, complete_checkpoints
    from ..runs.console import Console
    from ..runs.folder import clear
    from ..runs.offending import keep_offending_batch
    from ..runs.pictures import FirstAndLast
    from ..runs.recording import Recorder
    from ..runs.signs import Signs
    from ..runs.snapshot import going_on
    from ..threads import take_fair_threads

    text, total = job.yaml(), int(job.tree["total"])
    checkpoints = Checkpoints(job.folder, job.tree["checkpoint_every"], text, job.tree["checkpoint_keep"])
    filling = () if options.fixed_rows else (Filling(),)  # before the recorder, which writes what it foretold
    hooks = (*filling, FirstAndLast(job.folder), Signs(), Recorder(job.folder, text, job.name, job.sources), checkpoints, Console())
    loop = job.build(hooks, devices, FullySharded() if options.shard else None)
    loop.meter = meter_of(loop, options.teraflops)
    if options.open:
        _open_pages(loop)
    take_fair_threads(loop.objective.policy.device)
    lock.take(create=not options.resume)
    _require_new(job, options)  # another run may have come and gone while this one was built
    start = _resumed(job, checkpoints, loop, options) if options.resume else 0
    if start > total or (start == total and _is_ended(job)):
        return say(f"{job.folder} has done {start} of {total} steps; nothing is left to do. Give a larger --total and --new-total.", 0)
    if options.overwrite and not options.resume and devices.rank == 0:
        clear(job.folder)
        forget(job.folder, job.sources())
    devices.barrier()
    try:
        loop.advance(total, start)
    except KeyboardInterrupt:
        return say(f"interrupted; {going_on(job.folder, _continue(job.folder, options))}", 130)
    except (RewardError, NonFiniteError) as error:
        kept = keep_offending_batch(error, job.folder, devices.rank)
        said = f"{str(error).rstrip('.')}. The batch is in {kept}" if kept else str(error).rstrip(".")
        if isinstance(error, RewardError):  # perhaps it does not fail again
            again = _continue(options.run, options, overrides)  # from beside the run file, where the reward may be mended
            reword(error, f"{said}; {going_on(job.folder, again)}")
        else:
            saved = complete_checkpoints(job.folder, quiet=True)
            reword(error, f"{said}. Last good checkpoint: {saved[-1] if saved else 'none yet'}.")
        raise
    except Exception:  # of a part: its own words stay as they are
        if devices.rank == 0 and complete_checkpoints(job.folder, quiet=True):
            say(f"the run stopped; {going_on(job.folder, _continue(options.run, options, overrides))}", 1)
        raise
    return 0


def _continue(run: str | Path, options: argparse.Namespace, overrides: Sequence[str] = ()) -> str:
    """Say how a run is continued.

    Args:
        run: its folder, which holds all keys and the own parts as they were; or what the command named, whose parts are read anew
        options: options of the command; those that hold for the continued run as well are repeated
        overrides: keys of the command line, which a folder does not need
    """
    kept = [f"--{name.replace('_', '-')}" for name in ("new_total", "open", "fixed_rows", "shard") if vars(options)[name]]
    return f"Continue by: {shlex.join(['diffalign', 'train', str(run), '--resume', *kept, *overrides])}"


def _is_ended(job: "Run") -> bool:
    """True if the run folder has the report of this run to its end. An interrupted run has one too, but its total was another."""
    from ..runs.identity import differences
    from ..runs.snapshot import CONFIG

    written = job.folder / CONFIG
    changed = written.exists() and differences(written.read_text(encoding="utf-8"), job.yaml())
    return (job.folder / "report.html").exists() and not changed


def _open_pages(loop: "AlignmentLoop") -> None:
    from ..core import ConfigError
    from ..core.scoring import inner
    from ..voting import Page, Votes

    rewards = map(inner, loop.named_rewards().values())
    pages = [reward.voters for reward in rewards if isinstance(reward, Votes) and isinstance(reward.voters, Page)]
    if not pages:
        raise ConfigError("--open needs a reward that asks people on a page, as `Votes` with a `Page` does; this run has none")
    for page in pages:
        page.open = True


def _resumed(job: "Run", checkpoints: "Checkpoints", loop: "AlignmentLoop", options: argparse.Namespace) -> int:
    from ..runs.snapshot import checkpoints as named

    if job.folder.is_dir() and not named(job.folder):
        checkpoints.require_same_run(job.folder, options.new_total)
        if loop.devices.rank == 0:
            say(f"{job.folder} has no checkpoint yet: the run begins at its first step", 0)
        return 0
    return checkpoints.resume(loop, options.new_total)


def _require_new(run: "Run", options: argparse.Namespace) -> None:
    from ..core import ConfigError
    from ..runs.folder import has_begun

    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: one keeps what the run folder holds, the other does not")
    if options.new_total and not options.resume:
        raise ConfigError("--new-total needs --resume: a new run has no earlier total")
    if run.folder.exists() and not run.folder.is_dir():
        raise ConfigError(f"folder {run.folder} must be a folder; it is a file. Give another --folder.")
    if has_begun(run.folder) and not (options.resume or options.overwrite):
        raise ConfigError(
            f"folder {run.folder} must not hold another run; it has steps of one. Give --resume to continue from its last checkpoint, "
            "--overwrite to replace it, or another --folder."
        )
