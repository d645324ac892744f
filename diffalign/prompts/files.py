"""Lists and files of prompts."""

import codecs
import csv
import difflib
import functools
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from diffalign.core import ConfigError, Prompt, Size
from diffalign.embedded import WORLDS

from .lists import NAMES, PREFIX, generated


def _fixed(prompts: Sequence[Prompt | str]) -> tuple[Prompt | str, ...]:
    if isinstance(prompts, str):  # a text is a sequence too: of its letters
        raise ValueError(f"Prompts.prompts must be a list of texts; got the text {str(prompts)!r}. Put it in a list: {[str(prompts)]!r}")
    return tuple(prompts)


@attrs.frozen
class Prompts:
    """List of prompts in a shuffled, endless order that depends only on (seed, step), so that resume needs no state.

    Every epoch is a new permutation; a step takes the next `count` prompts. All samples of a step must have one shape. So prompts that ask
    for an image size ("height" and "width" in their metadata) are drawn only with others of that size: step s takes the size of prompt s
    in the endless order, and then the next `count` prompts of that size. In as many steps as there are prompts, each comes `count` times.

    Args:
        prompts: prompts, at least one
        seed: seed of the shuffles
        shuffle: whether to shuffle; False keeps the order of the list
    """

    prompts: Sequence[Prompt | str] = attrs.field(converter=_fixed)
    seed: int = 0
    shuffle: bool = True

    def __attrs_post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("Prompts.prompts must hold at least one prompt; got none")
        buckets: dict[Size | None, list[Prompt]] = {}
        for place, prompt in enumerate(map(Prompt.of, self.prompts)):
            require_readable(prompt, f"Prompts.prompts[{place}]")
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
        """Prompts from which a step chooses, and the number of earlier steps that chose from them."""
        if len(self._buckets) == 1:
            return next(iter(self._buckets.values())), step
        rounds, place = divmod(step, len(self.prompts))
        sizes = [Prompt.of(self.prompts[index]).size for index in self._order(rounds, len(self.prompts))[: place + 1]]
        bucket = self._buckets[sizes[-1]]
        return bucket, rounds * len(bucket) + sizes[:-1].count(sizes[-1])

    def _order(self, epoch: int, length: int) -> Sequence[int]:
        return _shuffled(self.seed, epoch, length) if self.shuffle else range(length)


@functools.lru_cache(maxsize=16)  # a mixture asks for one prompt at a time, and a list may be long
def _shuffled(seed: int, epoch: int, length: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"prompts {seed} {epoch}").shuffle(order)
    return tuple(order)


@attrs.frozen
class PromptFile:
    """Prompts of a UTF-8 file. The suffix of its name (in upper or lower case) gives the format:

        .txt             one prompt per line
        .json            a list of texts or objects
        .jsonl, .ndjson  a text or an object per line
        .csv, .tsv       a table whose first line names the columns, one of them "prompt"

    An object has "prompt" and any other fields, which become the prompt's metadata. So do the other columns of a table, as text. "height"
    and "width" (pixels) are the image size, see `Prompts`. Empty lines are allowed only at the end. Lines end at line feeds only. The
    file may begin with a byte order mark. An object has each key once; a .txt file holds no JSON.

    Args:
        path: path of the file. "shapeworld/NAME" (count, binding, relation, text, all) and "digits/NAME" (any, set, name, all) are lists
            that ship with the package; "generated/NAME" (composition, text, preference, geneval) are drawn by rule and need no file. Add
            -held-out to a name for its held-out list (geneval has none)
        seed, shuffle: see `Prompts`

    Raises:
        ConfigError: the file does not exist, is empty or has another suffix, or a line is empty, malformed or no text (the message gives
            its number).
    """

    path: str
    seed: int = 0
    shuffle: bool = True
    _prompts: Prompts = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_prompts", Prompts(read_prompts(self.path), self.seed, self.shuffle))

    @property
    def prompts(self) -> Sequence[Prompt | str]:
        """List of prompts, in the file's order."""
        return self._prompts.prompts

    def draw(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of a step."""
        return self._prompts.draw(step, count)


def require_readable(text: str, where: str) -> str:
    """Return the text if a tokenizer can read it.

    Raises:
        ConfigError: it holds half a character (a lone surrogate), which comes from broken JSON escapes or another encoding, or the
            character NUL, which comes from UTF-16 without a mark.
    """
    if "\0" in text:
        raise ConfigError(f"{where}: character {text.index(chr(0)) + 1} is NUL (U+0000), which is no text. Is it UTF-16? Save it as UTF-8.")
    odd = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if odd is not None:
        raise ConfigError(
            f"{where}: character {odd + 1} is half a character (lone surrogate U+{ord(text[odd]):04X}), which no tokenizer reads. Write it "
            "as one character, or leave it out."
        )
    return text


def read_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file, in order; see `PromptFile`."""
    world, _, name = path.partition("/")
    if world == PREFIX and not Path(path).suffix:
        return generated(name)
    file = WORLDS[world] / "prompts" / f"{name}.txt" if world in WORLDS and not Path(path).suffix else Path(path).expanduser()
    ending = file.suffix.lower()
    if ending not in _READERS:
        known = ", ".join(_READERS)
        raise ConfigError(f"prompts.path must end in one of {known}, which gives the format; got {path!r}")
    prompts = [_prompt(entry, where) for entry, where in _READERS[ending](_text(file, path), path)]
    if not prompts:
        raise ConfigError(f"{path} must hold at least one prompt; it is empty")
    return prompts


Entries = Iterator[tuple[Any, str]]
"""Entries that should be prompts, each with its place for messages."""


def _text(file: Path, path: str) -> str:
    try:
        content = file.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigError(f"prompts.path must be a readable UTF-8 file; {path!r} is UTF-16. Save it as UTF-8.")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts.path must be a readable UTF-8 file; got {path!r}: {error}.{_meant(file, path)}") from error


def _meant(file: Path, path: str) -> str:
    """Suggestion for the path of a file that is not there: a similar one beside it, or a shipped list; else all of these.

    Names are compared without their suffix, which would make short names similar. A file of another suffix must have the same name.
    """
    if os.path.exists(file):  # Path.exists raises at a name that is too long
        return ""
    above, stem, ending = os.path.dirname(path), Path(path).stem, Path(path).suffix.lower()
    lists = [(world, each.stem) for world, folder in WORLDS.items() for each in sorted((folder / "prompts").glob("*.txt"))]
    files = [each for each in Path(above).expanduser().glob("*.*") if each.suffix.lower() in _READERS]
    beside = {each.stem: each.name for each in files if each.stem == stem or each.suffix.lower() == ending}
    known = beside if ending else {each: each for world, each in lists if world == above}
    if near := difflib.get_close_matches(stem, known, n=1):
        return f" Did you mean {os.path.join(above, known[near[0]])}?"
    return f" Shipped lists: {', '.join(f'{world}/{each}' for world, each in [*lists, *((PREFIX, each) for each in NAMES)])}"


def _lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield lines with their places. Other line separators, such as U+2028, are part of a prompt."""
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ConfigError(f"{path}, line {number}: the line is empty; every line must hold a prompt. Remove it.")
        yield line.removesuffix("\r"), f"{path}, line {number}"


def _plain(text: str, path: str) -> Entries:
    if "\r" in text and "\n" not in text:
        raise ConfigError(
            f"{path}: lines must end at line feeds; there are only carriage returns. Save it with line ends of Unix or Windows."
        )
    for line, where in _lines(text, path):
        if line.lstrip().startswith("{") and '"prompt"' in line:
            raise ConfigError(f"{where}: a line of a .txt file is the prompt itself; this one is JSON. Name the file .jsonl.")
        yield line, where


def _json_lines(text: str, path: str) -> Entries:
    for line, where in _lines(text, path):
        yield _parsed(line, where), where


def _json_list(text: str, path: str) -> Entries:
    entries = _parsed(text, path, across_lines=True)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} must hold a JSON list of prompts; got {type(entries).__name__}")
    yield from ((entry, f"{path}, entry {number}") for number, entry in enumerate(entries, 1))


def _table(text: str, path: str, delimiter: str) -> Entries:
    reader = csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline="\n"), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if names.count("prompt") != 1 or len(set(names)) < len(names):
            raise ConfigError(f'{path}, line 1: must name the columns, each once, one of them "prompt"; got {str(names)[:200]}')
        empty = 0
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                empty = empty or reader.line_num
                continue
            if empty:
                raise ConfigError(f"{path}, line {empty}: the line is empty; every line must hold a prompt. Remove it.")
            if len(cells) != len(names):
                raise ConfigError(
                    f"{where}: must have {len(names)} cells, as the first line; got {len(cells)}. Quote a cell with {delimiter!r}"
                )
            row: dict[str, Any] = dict(zip(names, cells, strict=True))
            for side in ("height", "width"):
                if side in row:
                    row[side] = int(row[side]) if row[side].strip().isdecimal() else row[side].strip() or None
            yield row, where
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: no table that can be read: {error}") from error


def _parsed(text: str, where: str, across_lines: bool = False) -> Any:
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_once, where=where))
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if across_lines else ""
        raise ConfigError(f"{where}{place}: not JSON: {error.msg} at column {error.colno}") from error
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ConfigError(f"{where}: no JSON that can be read: {error}") from error


def _once(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Make an object of its fields, each of which it may have once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in {other for other, _ in pairs[:place]})
        raise ConfigError(f"{where}: an object has {twice!r} twice; keep one")
    return made


_READERS: Mapping[str, Callable[[str, str], Entries]] = {
    ".txt": _plain,
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
}


def _prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    text = _stripped(entry["prompt"]) if isinstance(entry, dict) and isinstance(entry.get("prompt"), str) else ""
    if not text:
        raise ConfigError(f'{where}: must be text, or an object with a text "prompt"; got {json.dumps(entry)[:80]}')
    prompt = Prompt(require_readable(text, where), {key: value for key, value in entry.items() if key != "prompt"})
    try:
        _ = prompt.size
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return prompt


def _stripped(text: str) -> str:
    """Remove spaces around a text, and byte order marks, which are often copied with text."""
    while text != (inner := text.strip().strip("\ufeff")):
        text = inner
    return text
