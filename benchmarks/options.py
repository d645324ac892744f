"""The options of a program: the arguments of its `main`, with the help of the Args in the docstring of its file."""

import argparse
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import docstring_parser
import jsonargparse


def parser_of(main: Callable[..., object], name: str, told: str) -> jsonargparse.ArgumentParser:
    """One option for each parameter: an argument without a default is positional, a bool a flag, a tuple takes several words.

    Args:
        main: a function of typed arguments, or of one attrs class, whose fields they then are
        name: of the program, for the line of usage
        told: what it is, and what the arguments are; those of a class stand in its docstring
    """
    owner = _owner(main)
    told, _, listed = told.partition("\n\nArgs:\n")
    documented = f"{told}\n\nArgs:\n{listed}" if owner is main else inspect.getdoc(owner) or ""
    helps = {
        entry.arg_name: entry.description for entry in docstring_parser.parse(documented, docstring_parser.DocstringStyle.GOOGLE).params
    }
    parser = jsonargparse.ArgumentParser(prog=name, description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    for parameter in inspect.signature(owner).parameters.values():
        option = parameter.name if _is_required(parameter) else f"--{parameter.name.replace('_', '-')}"
        parser.add_argument(option, **_taken(parameter, helps[parameter.name] or ""))
    return parser


def called(main: Callable[..., Any], parser: jsonargparse.ArgumentParser, words: Sequence[str]) -> Any:
    """What `main` gives for the words of a command line."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in parser.parse_args(list(words)).as_dict().items()}
    if (owner := _owner(main)) is main:
        return main(**values)
    try:
        options = owner(**values)
    except ValueError as error:  # of a validator
        parser.error(str(error))
    return main(options)


def _owner(main: Callable[..., object]) -> Callable[..., object]:
    """Whose arguments the options are."""
    kinds = [parameter.annotation for parameter in inspect.signature(main).parameters.values()]
    return kinds[0] if len(kinds) == 1 and inspect.isclass(kinds[0]) and attrs.has(kinds[0]) else main


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _taken(parameter: inspect.Parameter, told: str) -> dict[str, Any]:
    """What the parser must know of a parameter."""
    kind, default = parameter.annotation, {} if _is_required(parameter) else {"default": parameter.default}
    if kind is bool:
        return {"action": "store_true", "help": told, **default}
    each = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    choices = typing.get_args(each[0]) if typing.get_origin(each[0]) is typing.Literal else ()
    told += f"; of {', '.join(map(repr, choices))}" if choices else ""
    if default.get("default") not in (None, ()):
        told += f" (default: {'all' if default['default'] == choices else default['default']})"
    settings = {"type": each[0], "metavar": parameter.name.upper(), "help": told.replace("%", "%%")}
    if each[0] is kind:
        return {**settings, **default}
    many = "*" if each[-1] is ... else len(each)
    return {**settings, "nargs": many, **{name: list(value) for name, value in default.items()}}
