"""Check your own part against the contract of its kind, also on a pretended device; for a reward, measure scale, noise and speed."""

import argparse
import importlib.util
import inspect
from collections.abc import Sequence

from .options import refuse_overrides


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", metavar="PACKAGE:NAME", help="a policy, sampler, objective or reward, or a function that builds one")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts for a reward, as PromptFile reads them; the first eight are scored (captions of ShapeWorld)",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..config.parts import find, suggestion
    from ..core import ConfigError
    from ..prompts import read_prompts
    from ..testing.elsewhere import prepare_second_device
    from ..testing.parts import examination
    from ..testing.properties import examine

    prepare_second_device()  # must come before any backward pass, which importing the part may make
    refuse_overrides("check-part", "a part", overrides)
    try:
        part = find(options.part)
    except LookupError as error:
        _refuse_module(options.part)
        why = str(error) or suggestion(options.part, ()).strip()
        raise ConfigError(f"{options.part} must name an object that can be imported. {why}") from error
    if inspect.ismodule(part):
        _refuse_module(options.part)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    try:
        known = examination(part, prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    findings = examine(known.subject, known.properties)
    print(f"{options.part}: {known.kind}")
    for finding in findings:
        print(finding)
    failed = sum(bool(finding.failure) for finding in findings)
    skipped = sum(bool(finding.skipped) for finding in findings)
    print(f"{len(findings) - failed - skipped} of {len(findings)} properties hold{f', {skipped} skipped' if skipped else ''}")
    if known.kind == "reward" and not failed:
        from ..testing.reward_contract import measure

        print(measure(known.subject))
    return 1 if failed else 0


def _refuse_module(path: str) -> None:
    """Refuse the path of a module, which holds parts and is none.

    Raises:
        ConfigError: it is one.
    """
    from ..core import ConfigError

    name = path.replace(":", ".")
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # finding a module imports its package, which may raise anything
        return
    if spec is not None:
        raise ConfigError(f"{path} must name a class, function or object; it is a module. Name what is in it: {name}:NAME")
