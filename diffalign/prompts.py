"""Prompt sources."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .core import ConfigError, Prompt, Size
from .embedded import SHAPEWORLD


def _fixed(prompts: Sequence[Prompt | str]) -> tuple[Prompt | str, ...]:
    return tuple(prompts)


@attrs.frozen
class Prompts:
    """A list of prompts in a shuffled, endless order that depends on (seed, step) alone, so that resume needs no state.

    Every epoch is a permutation of its own; a step takes the next `count` prompts. Prompts that ask for a size ("height" and "width" in
    their metadata) are drawn with others of that size only, so that all samples of a step share a shape: step s takes the next `count` of
    those that are as large as prompt s of the endless order. In as many steps as there are prompts, each comes `count` times.

    Args:
        prompts: at least one
        seed: of the shuffles
        shuffle: keep the order of the list if false
    """

    prompts: Sequence[Prompt | str] = attrs.field(converter=_fixed)
    seed: int = 0
    shuffle: bool = True

    def __attrs_post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("Prompts.prompts must hold at least one prompt; got none")
        buckets: dict[Size | None, list[Prompt]] = {}
        for prompt in map(Prompt.of, self.prompts):
            buckets.setdefault(prompt.size, []).append(prompt)
        object.__setattr__(self, "_buckets", buckets)

    _buckets: Mapping[Size | None, Sequence[Prompt]] = attrs.field(init=False, repr=False, eq=False)

    def draw(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of a step."""
        bucket, turn = self._turn(step)
        length = len(bucket)
        places = range(turn * count, (turn + 1) * count)
        orders = {epoch: self._order(epoch, length) for epoch in {place // length for place in places}}
        return [bucket[orders[place // length][place % length]] for place in places]

    def _turn(self, step: int) -> tuple[Sequence[Prompt], int]:
        """The prompts that a step chooses from, and how many steps before it did so."""
        if len(self._buckets) == 1:
            return next(iter(self._buckets.values())), step
        rounds, place = divmod(step, len(self.prompts))
        sizes = [Prompt.of(self.prompts[index]).size for index in self._order(rounds, len(self.prompts))[: place + 1]]
        bucket = self._buckets[sizes[-1]]
        return bucket, rounds * len(bucket) + sizes[:-1].count(sizes[-1])

    def _order(self, epoch: int, length: int) -> list[int]:
        order = list(range(length))
        if self.shuffle:
            random.Random(f"prompts {self.seed} {epoch}").shuffle(order)
        return order


@attrs.frozen
class PromptFile:
    """The prompts of a file: .txt, one a line; .json, a list; .jsonl, one object a line.

    An object has "prompt" and any other fields, which become the prompt's metadata; "height" and "width" (pixels) are the size that it is
    drawn in, see `Prompts`.

    Args:
        path: the file; "shapeworld/NAME" is a list that ships with the package (count, binding, relation, text, all; -held-out)
        seed, shuffle: as in `Prompts`

    Raises:
        ConfigError: no such file, an empty file, an empty or malformed line (with its number).
    """

    path: str
    seed: int = 0
    shuffle: bool = True
    _prompts: Prompts = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_prompts", Prompts(read_prompts(self.path), self.seed, self.shuffle))

    @property
    def prompts(self) -> Sequence[Prompt | str]:
        """The list, in the file's order."""
        return self._prompts.prompts

    def draw(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of a step."""
        return self._prompts.draw(step, count)


SHIPPED = SHAPEWORLD / "prompts"


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, in order; see `PromptFile`."""
    file = SHIPPED / f"{path.removeprefix('shapeworld/')}.txt" if path.startswith("shapeworld/") else Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(f"shapeworld/{name.stem}" for name in SHIPPED.glob("*.txt")))
        raise ConfigError(f"prompts.path must be a readable UTF-8 file; got {path!r}: {error}. Shipped lists: {shipped}") from error
    if file.suffix == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            raise ConfigError(f"{path}: no JSON that can be read: {error}") from error
        if not isinstance(entries, list):
            raise ConfigError(f"{path} must hold a JSON list of prompts; got {type(entries).__name__}")
        prompts = [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, 1)]
    else:
        lines = text.splitlines()
        prompts = [_line(line, f"{path}, line {number}", file.suffix == ".jsonl") for number, line in enumerate(lines, 1)]
    if not prompts:
        raise ConfigError(f"{path} must hold at least one prompt; it is empty")
    return prompts


def _line(line: str, where: str, is_json: bool) -> Prompt:
    if not line.strip():
        raise ConfigError(f"{where}: the line is empty; every line must hold a prompt. Remove it.")
    if not is_json:
        return Prompt(line.strip())
    try:
        return _entry(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: no JSON that can be read: {error}") from error


def _entry(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ConfigError(f'{where}: must be text, or an object with a text "prompt"; got {json.dumps(entry)[:80]}')
    prompt = Prompt(entry["prompt"].strip(), {key: value for key, value in entry.items() if key != "prompt"})
    try:
        _ = prompt.size
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return prompt
