"""Compare runs on the same prompts and noise, and at equal steps, rows and seconds."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measuring import SUBJECT, measuring_arguments
from .options import refuse_overrides

if TYPE_CHECKING:
    from ..core import Devices, RewardFunction
    from ..evaluation import Comparison, Evaluation
    from .subject import Subject

_EPILOG = (
    "Every checkpoint is sampled anew and scored by the rewards of all runs. The tables at equal steps, rows and seconds use the "
    "evaluations that the runs have recorded: give the runs an evaluation with `every`."
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"two or more; the others are compared with the first: {SUBJECT}")
    measuring_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="folder of the page (%(default)s)")
    parser.epilog = _EPILOG


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..core import ConfigError
    from ..evaluation import Comparison, Recorded, write_comparison
    from ..processes.devices import connect, disconnect
    from ..runs.folder import require_writable
    from .subject import Subject

    refuse_overrides("compare", "runs", overrides)
    require_writable(options.out, "--out")
    subjects = _told_apart([Subject.of(text).measured_on(options.prompts) for text in options.runs], options.runs)
    names = [subject.name for subject in subjects]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"compare needs two or more runs with different names; got {', '.join(names)}")
    devices = connect()
    try:
        comparison = Comparison(_evaluated(subjects, options, devices))
        if devices.rank == 0:
            runs = comparison.runs
            recorded = [Recorded.of(each.name, each.folder, runs[each.name].step) for each in subjects if each.folder is not None]
            page = write_comparison(options.out, comparison, recorded)
            for name, result in comparison.runs.items():
                print(f"{name}, step {result.step}: {result.table()}")
            print("\n".join([*_told(comparison), *comparison.notes(), str(page)]))
    finally:
        disconnect(devices)
    return 0


def _told(comparison: "Comparison") -> list[str]:
    """Say in lines what the runs differ by: paired differences to the first one, and win rates of the rewards."""
    from ..evaluation.pairing import over

    first, *others = comparison.runs
    differences, rates, few = comparison.differences(), comparison.win_rates(), comparison.fewer()
    width = max((len(name + over(name, few)) for name in differences), default=0)
    lines = []
    for run in others:
        lines.append(f"{first} -> {run}, the same prompts and noise: change [95 % interval over prompts]")
        lines += [f"  {name + over(name, few):<{width}}  {changes[run].signed()}" for name, changes in differences.items()]
    for name, pairs in rates.items():
        lines.append(f"reward {name}, share of images with the higher one, a tie counts one half [95 % interval over prompts]")
        lines += [f"  {one} against {other}  {rate}" for (one, other), rate in pairs.items()]
    return lines


def _told_apart(subjects: "Sequence[Subject]", texts: Sequence[str]) -> "list[Subject]":
    """Lengthen equal names by as much of the paths as tells the runs apart. A run that is given twice keeps its name."""
    import attrs

    left = [_longer_names(subject, text) for subject, text in zip(subjects, texts, strict=True)]
    names = [subject.name for subject in subjects]
    while equal := [place for place, name in enumerate(names) if names.count(name) > 1]:
        if not all(left[place] for place in equal):
            return list(subjects)
        for place in equal:
            names[place] = left[place].pop(0)
    return [attrs.evolve(subject, name=name) for subject, name in zip(subjects, names, strict=True)]


def _longer_names(subject: "Subject", text: str) -> list[str]:
    """The name with its suffix, for a run file, then with one folder above it, with two, ..."""
    from ..config.files import locate

    path = Path(text) if subject.folder is not None else locate(text)
    parts = Path(os.path.normpath(path.absolute())).parts[1:]
    shortest = 1 if subject.folder is None else subject.name.count("/") + 2
    return ["/".join(parts[-length:]) for length in range(shortest, len(parts) + 1)]


def _evaluated(subjects: "Sequence[Subject]", options: argparse.Namespace, devices: "Devices") -> "dict[str, Evaluation]":
    """Evaluate one run after the other, so that only one model at a time is in memory. Prompts and settings are those of the first run."""
    from ..evaluation import evaluate
    from ..evaluation.evaluate import usual_steps
    from .subject import Measuring, kept_apart

    measuring = Measuring.of(subjects[0], options)
    rewards: Mapping[str, Any] = {**kept_apart(_all_rewards(subjects), measuring.further), **measuring.further}
    settings, results = dict(measuring.settings), {}
    for subject in subjects:
        loop, step = subject.build(devices)
        policy = loop.evaluation_policy()
        settings["steps"] = settings["steps"] or usual_steps(policy)
        results[subject.name] = evaluate(policy, measuring.prompts, rewards, step=step, devices=devices, **settings)
        del loop, policy
    return results


def _all_rewards(subjects: "Sequence[Subject]") -> "dict[str, RewardFunction]":
    """The rewards of all runs by name.

    Raises:
        ConfigError: two runs have different rewards under one name.
    """
    from ..config.files import write_yaml
    from ..core import ConfigError
    from ..runs.identity import differences

    rewards: dict[str, RewardFunction] = {}
    first: dict[str, tuple[str, str]] = {}
    for subject in subjects:
        evaluation = subject.evaluation()
        for name, reward in subject.rewards(evaluation).items():
            mine = write_yaml({_ITSELF: subject.configuration(name, evaluation)})
            owner, known = first.setdefault(name, (subject.name, mine))
            if changed := differences(known, mine):
                told = [f"{_place(path)} is {before} in {owner} and {after} in {subject.name}" for path, before, after in changed[:4]]
                raise ConfigError(
                    f"the reward {name!r} must be the same in all runs; {'; '.join(told)}. Give one of them another name in its "
                    "config.yaml."
                )
            rewards.setdefault(name, reward)
    return rewards


_ITSELF = "it"


def _place(path: str) -> str:
    """Dotted path inside a reward, as on the command line; "it" for the reward itself."""
    return ".".join(name for name in path.split(".")[1:] if name not in ("class_path", "init_args")) or _ITSELF
