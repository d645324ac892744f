"""The command `diffalign`. Nothing heavy is imported before a command needs it."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from .config import Run
    from .core import AlignmentLoop

_RUN = "a run file, a run folder, or the name of a built-in run such as shapeworld_tmpo"
_OVERRIDES = "Any key of the run can be replaced after RUN by its dotted path: --sampler.steps 6 --sampler.plan.eta=0.9 --total 2"
_FILES = ("metrics.jsonl", "config.yaml", "environment.json", "evaluation.json", "report.html", "images", "lora", "best")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process by default

    Returns:
        Exit code: 0, 1 after an error at run time, 2 after one of configuration or usage, 130 after an interrupt.
    """
    options, overrides = _parser().parse_known_args(arguments)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # notes about optional packages would stand between the lines of a run
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m diffalign`: a user's own parts lie beside the run file
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        try:
            return _run(options, overrides)
        except KeyboardInterrupt:
            return _say("interrupted before the first step" if options.command == "train" else "interrupted", 130)
        except Exception as error:
            code = _exit_code(error)
            if code is None or options.debug:
                raise
            return _say(f"error: {error}", code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffalign", description="Aligns image models with rewards.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, run: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, epilog=_OVERRIDES if run else None, allow_abbrev=False)
        if run:
            command.add_argument("run", metavar="RUN", help=_RUN)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    train = add("train", "Train, and write a run folder.")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run folder")
    train.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")
    add("check", "Build everything and say what a step costs, without running or writing anything.")
    sample = add("sample", "Draw pictures; from a run folder, with its last checkpoint.")
    sample.add_argument("--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="a row of pictures each")
    sample.add_argument("--n", type=_positive, default=4, help="pictures of a prompt (%(default)s)")
    sample.add_argument("--steps", type=_positive, default=28, help="denoising steps (%(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    parts = add("parts", "List what can be plugged in where; or what one part takes.", run=False)
    parts.add_argument("name", nargs="?", metavar="NAME", help="a part: a name of the list or an import path")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _exit_code(error: Exception) -> int | None:
    """None for what no user has caused."""
    from .core import CheckpointError, ConfigError, ContractError, NonFiniteError, RewardError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, RewardError | NonFiniteError | ContractError | CheckpointError | ValueError | OSError) else None


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .config import ConfigWarning
    from .core import ConfigError

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        if issubclass(category, ConfigWarning):
            _say(f"warning: {message}", 0)
        else:
            shown(message, category, *place, **more)  # type: ignore[arg-type]

    warnings.simplefilter("always", ConfigWarning)
    warnings.showwarning = show
    if options.command == "parts":
        if overrides:
            raise ConfigError(f"parts takes a name and nothing else; got {' '.join(overrides)}")
        return _parts(options)
    return {"train": _train, "check": _check, "sample": _sample}[options.command](options, overrides)


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from . import config

    run = config.parse(options.run, overrides)
    _require_new(run, options)
    from .checkpoint import Checkpoints
    from .console import Console
    from .recording import Recorder

    text, total = run.yaml(), int(run.tree["total"])
    checkpoints = Checkpoints(run.folder, run.tree["checkpoint_every"], text)
    loop = run.build((Recorder(run.folder, text, run.name), checkpoints, Console()))
    start = checkpoints.restore(loop) if options.resume else 0
    if start >= total:
        return _say(f"{run.folder} has done {start} of {total} steps; nothing is left to do. Give a larger --total to go on.", 0)
    if options.overwrite and not options.resume:
        _clear(run.folder)
    try:
        loop.run(total, start)
    except KeyboardInterrupt:
        saved = sorted(run.folder.glob("step-??????"))
        if not saved:
            return _say(f"interrupted; there is no checkpoint in {run.folder} yet", 130)
        again = f"diffalign train {options.run} --resume"
        return _say(f"interrupted; the last checkpoint is {saved[-1]}. Go on, with the same --key values, by: {again}", 130)
    return 0


def _require_new(run: "Run", options: argparse.Namespace) -> None:
    from .core import ConfigError

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


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from . import config
    from .forecast import forecast

    run = config.parse(options.run, overrides)
    loop = run.build()
    print(run.yaml())
    print(forecast(loop, run.tree["total"]))
    return 0


def _sample(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from PIL.Image import registered_extensions

    from . import config
    from .core import ConfigError

    if options.out.suffix.lower() not in registered_extensions():
        raise ConfigError(f"--out must end in the name of a picture format such as .png; got {str(options.out)!r}")
    run = config.parse(options.run, overrides)
    loop = run.build()
    if Path(options.run).is_dir():
        from .checkpoint import Checkpoints

        Checkpoints(Path(options.run), run.tree["checkpoint_every"], run.yaml()).restore(loop)
    sheet = _drawn(loop, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(options.out)
    return 0


def _drawn(loop: "AlignmentLoop", options: argparse.Namespace) -> "Image":
    import torch

    from .core import Progress, Prompt, Streams
    from .evaluation.pictures import contact_sheet
    from .samplers import DeterministicSampler

    policy, prompts = loop.evaluation_policy(), [Prompt(text) for text in options.prompt]
    sampler = DeterministicSampler(options.steps, options.n, rows=loop.chunk)
    with torch.no_grad():
        latents = sampler.sample(policy, policy.encode(prompts), Progress(0, 1), Streams(options.seed)).samples
        images = torch.cat([policy.decode(piece).cpu() for piece in latents.split(loop.chunk)])
    return contact_sheet(images.view(len(prompts), options.n, *images.shape[1:]), options.prompt)


def _parts(options: argparse.Namespace) -> int:
    from .config import listing

    print(listing.everything() if options.name is None else listing.one(options.name))
    return 0
