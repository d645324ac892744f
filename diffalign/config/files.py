"""Run files: finding them, and reading their YAML strictly."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..core import ConfigError
from ..embedded import PUBLISHED, WORLDS
from .errors import listed, nearest

_FLOAT = r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)

_BREAKS = "\x85\u2028\u2029"
"""Characters that PyYAML takes as line breaks. It would turn them into spaces unless they are escaped."""


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2 (1e-4 is a number; "no", 1:30 and 2024-01-01 are text). It refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  the base class has it so

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears a second time (first in line {seen[key]}); keep one", key_node.start_mark
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes every text that YAML 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in _BREAKS) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_sequence(self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, dict | list | tuple) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


_DEPTH, _VALUES = 100, 1_000_000


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Args:
        text: one document
        source: its name in messages

    Raises:
        ConfigError: there is a syntax error or a duplicate key (the message names the line), or the text is nested too deeply or contains
            itself by an alias.
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        detail = error.problem or error.context or "not YAML"
        raise ConfigError(f"{source}{place}: {detail}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply; {_DEPTH} levels are more than enough") from error
    return _bounded(content, source)


def _bounded(value: Any, source: str) -> Any:
    """Refuse aliases that contain themselves, or that turn a few lines into millions of values.

    Raises:
        ConfigError: the value is too deep or too large.
    """
    left, seen = [(value, 0)], 0
    while left:
        inner, depth = left.pop()
        seen += 1
        if depth > _DEPTH or seen > _VALUES:
            raise ConfigError(f"{source}: must hold at most {_DEPTH} levels and {_VALUES} values; aliases (&, *) make it hold more")
        below = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        left.extend((each, depth + 1) for each in below)
    return value


def write_yaml(value: Any) -> str:
    """Write plain values as YAML text, which `read_yaml` reads back unchanged."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True)
    return text


def built_in() -> dict[str, Path]:
    """Run files that ship with the package, by name."""
    return {file.stem: file for place in (*WORLDS.values(), PUBLISHED) for file in sorted((place / "runs").glob("*.yaml"))}


def locate(run: str) -> Path:
    """Find the file of a run: a path, a run folder, or the name of a built-in run. A path has precedence.

    Raises:
        ConfigError: there is no such file.
    """
    path, names = Path(run), built_in()
    if path.is_file():
        return path
    if path.is_dir():
        file = path / "config.yaml"
        if file.is_file() and file.stat().st_size:
            return file
        lacking = "an empty" if file.is_file() else "no"
        raise ConfigError(f"{run} must be a run file or a run folder; this folder has {lacking} config.yaml{_of_a_program(path)}")
    if run in names:
        return names[run]
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    if (path.parent / "config.yaml").is_file() and not path.suffix:
        kept = [each.name for each in beside if (each / "manifest.json").is_file()]
        raise ConfigError(f"RUN {run!r}: there is no such checkpoint. {path.parent} has {listed(kept, 'and')}.")
    looks_like_path = path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1
    what = "there is no such file" if looks_like_path else "there is no file and no built-in run of that name"
    near = [each.name for each in beside if each.suffix in (".yaml", ".yml") or (each / "config.yaml").is_file()]
    guess = nearest(path.name, near) or nearest(path.stem, names)
    raise ConfigError(f"RUN {run!r}: {what}.{guess} Built in: {listed(names, 'and')}.")


_WRITTEN = re.compile(r"lora|student|best|step-\d+")
"""Names of what a run writes into its folder for others to read. An export is written by another command."""


def maker(path: str) -> str:
    """Name of the built-in run that writes a path in its usual folder, such as runs/NAME/student; "" if it is there, or is another path."""
    parts, names = Path(path).parts, built_in()
    inside = ((name, own) for runs, name, own in zip(parts, parts[1:], parts[2:], strict=False) if runs == "runs" and name in names)
    made = (name for name, own in inside if _WRITTEN.fullmatch(own))
    return "" if os.path.exists(path) else next(made, "")


def _of_a_program(folder: Path) -> str:
    """Say what to do with the folder of a run that a Python program has made, or of a checkpoint in it; "" for any other folder."""
    chosen = [folder] if (folder / "manifest.json").is_file() else []
    folder = folder.parent if chosen else folder
    checkpoints = chosen or sorted(folder.glob("step-*[0-9]"))
    if not (folder / "metrics.jsonl").is_file() and not checkpoints:
        return ""
    last = checkpoints[-1] if checkpoints else folder / "step-000100"
    weights = last / ("average.safetensors" if (last / "average.safetensors").is_file() else "policy.safetensors")
    adapters = (
        f" Adapters: {folder / 'lora'}, whose README.md says how plain diffusers draws with them." if (folder / "lora").is_dir() else ""
    )
    return (
        ", because a Python program has made the run: no command can build its parts again. In Python, build the policy as the program "
        f'does, then diffalign.runs.load_weights(policy, "{weights}"), and diffalign.evaluation.evaluate(policy, ...) or '
        f"diffalign.export.export(policy, ...).{adapters} A run file gives a folder that commands read (docs/quickstart.md)"
    )


def read_run(file: Path) -> dict[str, Any]:
    """Read the keys of a run file.

    Raises:
        ConfigError: the file is not readable, is not YAML, or does not hold keys.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} must be a readable UTF-8 file: {error}") from error
    content = read_yaml(text, str(file))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold keys (policy: ..., objective: ..., ...); got {type(content).__name__}")
    return content
