"""One prompt file by its number: it is read as its writer meant it, or one message of ours refuses it."""

import csv
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core import ConfigError
from diffalign.prompts import read_prompts

from .fault import FaultError

ENDINGS = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
LETTERS = (
    *("a", "b", "z", " ", " ", "Q", "7", ",", ";", '"', "'", "\\", "{", "}", "[", "]", ":", "/", "#", "|", "\t", "é", "ß", "漢", "🙂"),
    *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\u00a0", "\u200b", "\ufeff", "e\u0301", "\u202e", "\U0001f468\u200d\U0001f469"),
)
Entry = tuple[str, dict[str, Any]]
"""Text and metadata."""


def stripped(text: str) -> str:
    """A prompt without spaces and byte order marks around it, however they are mixed."""
    while text != (less := text.strip().strip("\ufeff")):
        text = less
    return text


def _text(chance: random.Random, forbidden: str) -> str:
    text = "".join(chance.choice([letter for letter in LETTERS if letter not in forbidden]) for _ in range(chance.randint(1, 12)))
    return f"{text}w" if chance.random() < 0.5 or not stripped(text) else text


def _metadata(chance: random.Random) -> dict[str, Any]:
    values = (1, 2.5, None, True, "x", [1, {"class": "cat", "count": 2}], {"a": "é"})
    return {key: chance.choice(values) for key in chance.sample(("tag", "text", "include", "n"), chance.randint(0, 2))}


def written(number: int) -> tuple[str, bytes, list[Entry]]:
    """A good file of a number: its ending, its bytes and what it means."""
    chance = random.Random(f"prompts {number}")
    ending = chance.choice(ENDINGS)
    tabled, plain = ending in (".csv", ".tsv"), ending == ".txt"
    entries = [
        (_text(chance, "{[" if plain else ""), {} if plain or (not tabled and chance.random() < 0.5) else _metadata(chance))
        for _ in range(chance.randint(1, 5))
    ]
    if tabled:
        names = chance.sample(("tag", "text", "note"), chance.randint(0, 2))
        entries = [(text, {name: _text(chance, "") for name in names}) for text, _ in entries]
        content = _table(entries, names, "," if ending == ".csv" else "\t", chance)
    else:
        content = _lines(entries, ending, chance)
    if not tabled and ending != ".json":
        content += "\n" * chance.randint(0, 2)
    if chance.random() < 0.3:
        content = content.replace("\r\n", "\n").replace("\n", "\r\n")
    mark = b"\xef\xbb\xbf" if chance.random() < 0.3 else b""
    shown = "".join(letter.upper() if chance.random() < 0.2 else letter for letter in ending)
    return shown, mark + content.encode(), [(stripped(text), more) for text, more in entries]


def _table(entries: Sequence[Entry], names: Sequence[str], delimiter: str, chance: random.Random) -> str:
    out = io.StringIO()
    columns = ["prompt", *names]
    chance.shuffle(columns)
    quoting = chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.DictWriter(out, columns, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"prompt": text, **more} for text, more in entries)
    return out.getvalue()


def _lines(entries: Sequence[Entry], ending: str, chance: random.Random) -> str:
    if ending == ".txt":
        return "\n".join(text for text, _ in entries)
    ascii_only = chance.random() < 0.5
    values = [text if not more and chance.random() < 0.5 else {"prompt": text, **more} for text, more in entries]
    if ending == ".json":
        return json.dumps(values, ensure_ascii=ascii_only, indent=chance.choice((None, 1)))
    return "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)


def broken(content: bytes, chance: random.Random) -> bytes:
    """Bytes as copies, editors and accidents leave them."""
    kind = chance.randrange(12)
    at = chance.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[at:]
    if kind == 2:
        return content[:at] + content[at + chance.randint(1, 4) :]
    if kind in (3, 4, 5):
        odd = (
            b"\n",
            b"\r",
            b"\0",
            b"\xff",
            b'"',
            b"\\",
            b"{",
            b"[",
            b",",
            b"\t",
            b"\xef\xbb\xbf",
            b"\xed\xa0\x80",
            b"\\ud800",
            b"[" * 5000,
            b"9" * 5000,
        )
        return content[:at] + chance.choice(odd) + content[at:]
    if kind == 6:
        other = chance.randrange(len(content) + 1)
        return content[: max(at, other)] + content[min(at, other) :]
    if kind == 7:
        return content.decode().encode(chance.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "utf-7")), errors="replace")
    if kind == 8:
        return content.replace(b"\r\n", b"\n").replace(b"\n", b"\r")
    if kind == 9:
        return content.replace(b'"prompt"', chance.choice((b'"Prompt"', b'"caption"', b'"prompt" ', b'"prompt": "x", "prompt"')))
    if kind == 10:
        return content.replace(b"\n", b"\n\n", 1)
    return b"" if chance.random() < 0.2 else content + content


def meant(ending: str, content: bytes) -> list[Entry]:
    """What the bytes mean by the plainest means of Python.

    Raises:
        Exception: nothing.
    """
    text = content.decode("utf-8-sig")
    if ending in (".csv", ".tsv"):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if ending == ".csv" else "\t", strict=True)
        entries = [{str(key).strip(): value for key, value in row.items()} for row in rows]
    elif ending == ".json":
        entries = json.loads(text)
    else:
        lines = text.split("\n")
        while lines and not lines[-1].strip():
            lines.pop()
        entries = [{"prompt": line} if ending == ".txt" else json.loads(line) for line in lines]
    objects = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
    return [(stripped(entry["prompt"]), {key: value for key, value in entry.items() if key != "prompt"}) for entry in objects]


def case(number: int, folder: Path) -> str:
    """Try one file.

    Returns:
        What came of it.

    Raises:
        FaultError: other prompts than those that the file means, or no message of ours.
    """
    ending, content, entries = written(number)
    whole = number % 5 == 0
    content = content if whole else broken(content, random.Random(f"broken {number}"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"prompts{ending}"
    file.write_bytes(content)
    about = f"prompts {number}, {ending}, {content[:200]!r}"
    try:
        read = [(str(prompt), dict(prompt.metadata)) for prompt in read_prompts(str(file))]
    except ConfigError as error:
        if whole or len(str(error)) > 1500:
            raise FaultError(f"{about}: refused: {str(error)[:1000]}") from error
        return "refused"
    except Exception as error:
        raise FaultError(f"{about}: {type(error).__name__}: {error}") from error
    finally:
        file.unlink()
    if whole:
        if not _equal(read, entries):
            raise FaultError(f"{about}: was read as {read}")
        return "as its writer meant it"
    try:
        expected = meant(ending.lower(), content)
    except Exception as error:
        raise FaultError(f"{about}: was read as {read}, and means nothing: {type(error).__name__}: {error}") from error
    if not _equal(read, expected):
        raise FaultError(f"{about}: was read as {read}")
    if any("\0" in text for text, _ in read):
        raise FaultError(f"{about}: a prompt with a NUL was read")
    return "as Python reads it"


def _equal(read: Sequence[Entry], expected: Sequence[Entry]) -> bool:
    """True for the same texts and metadata in the same order; in JSON, because a NaN does not equal itself."""
    return json.dumps(read, sort_keys=True) == json.dumps(expected, sort_keys=True)
