"""Command `diffalign`. Large packages such as torch are imported only when a command needs them."""

import argparse
import difflib
import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import __version__, commands
from .commands.options import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: arguments without the program's name; by default those of the process

    Returns:
        Exit code: 0, 1 after an error at run time, 2 after an error of configuration or usage, 130 after an interrupt.
    """
    parser, given = _parser(), sys.argv[1:] if arguments is None else list(arguments)
    _require_command(parser, given)
    options, overrides = parser.parse_known_args(given)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # else their notes about optional packages mix with the output of a run
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m diffalign` does, to find a user's parts beside the run file
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        try:
            _show_configuration_warnings()
            _refuse_other_commands(options.command, overrides)
            done = int(_module(options.command).run(options, overrides))
            sys.stdout.flush()
            return done
        except BrokenPipeError:  # whoever read has seen enough: `diffalign parts | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the interpreter's last flush complain
            return 0
        except KeyboardInterrupt:
            return say("interrupted before the first step" if options.command == "train" else "interrupted", 130)
        except Exception as error:
            code = _exit_code(error)
            if code is None or options.debug:
                raise
            return say(f"error: {error}", code)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{command.replace('-', '_')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffalign", description="Aligns image models with rewards.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    known = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.NAMES:
        module = _module(name)
        text = (module.__doc__ or "").partition("\n")[0]
        command = known.add_parser(name, help=text, description=text, allow_abbrev=False)
        module.configure(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _require_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End the process with a usage error that names the most similar command, if there is none of the given name."""
    name = next((word for word in words if not word.startswith("-")), None)
    near = [] if name is None or name in commands.NAMES else difflib.get_close_matches(name, commands.NAMES, n=1)
    if near:
        parser.error(f"there is no command {name!r}. Did you mean {near[0]}?")


def _refuse_other_commands(command: str, overrides: Sequence[str]) -> None:
    """Refuse options without a value that only other commands have; they would be taken for keys of the run whose value is forgotten.

    A key of a run is none, though another command may have an option of its name: its value is forgotten.

    Raises:
        ConfigError: there is one; the message names the commands.
    """
    from .config.errors import listed
    from .config.run import keys
    from .core import ConfigError

    for word, after in itertools.pairwise([*overrides, "--"]):
        bare = word.startswith("--") and "=" not in word and after.startswith("--")
        if not bare or word.removeprefix("--") in keys():
            continue
        if having := [other for other in commands.NAMES if word in _options_of(other)]:
            raise ConfigError(f"{word} is an option of diffalign {listed(having, 'and')}; diffalign {command} does not have it")


class _Noting(argparse.ArgumentParser):
    """Parser that notes the names of the options that it is given."""

    def __init__(self) -> None:
        self.options: list[str] = []
        super().__init__(add_help=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        return action


def _options_of(command: str) -> list[str]:
    parser = _Noting()
    _module(command).configure(parser)
    return parser.options


def _exit_code(error: Exception) -> int | None:
    """Exit code of a user error; None for a bug."""
    from torch import OutOfMemoryError

    from .core import CheckpointError, ConfigError, ContractError, NonFiniteError, ProcessError, RewardError, UpdateError

    if isinstance(error, ConfigError):
        return 2
    expected = (
        RewardError,
        NonFiniteError,
        ContractError,
        CheckpointError,
        ProcessError,
        UpdateError,
        OutOfMemoryError,
        ValueError,
        OSError,
    )
    return 1 if isinstance(error, expected) else None


def _show_configuration_warnings() -> None:
    """Show each configuration warning as one line on stderr, without the line of code that raised it."""
    from .config import ConfigWarning

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        if issubclass(category, ConfigWarning):
            say(f"warning: {message}", 0)
        else:
            shown(message, category, *place, **more)  # type: ignore[arg-type]

    warnings.simplefilter("always", ConfigWarning)
    warnings.showwarning = show
