"""Prompts about objects, in the words and with the metadata of GenEval's files."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.core import Prompt

NUMBERS = ("two", "three", "four")
"""Words for the counts 2, 3 and 4."""

_TURNED = {"right of": "left of", "below": "above"}


def single(name: str) -> Prompt:
    """One object."""
    return _prompt("single_object", article(name), [_one(name)])


def pair(first: str, second: str) -> Prompt:
    """Two objects."""
    return _prompt("two_object", f"{article(first)} and {article(second)}", [_one(first), _one(second)])


def counted(name: str, count: int) -> Prompt:
    """Exact number of an object, 2 to 4. The plural is the benchmark's, which knows no exceptions."""
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    more = {"exclude": [{"class": name, "count": count + 1}]}
    return _prompt("counting", f"{NUMBERS[count - 2]} {plural}", [{"class": name, "count": count}], more)


def colored(name: str, color: str) -> Prompt:
    """An object of a colour."""
    return _prompt("colors", f"{article(color)} {name}", [_one(name, color=color)])


def positioned(first: str, position: str, second: str) -> Prompt:
    """The first object lies so, seen from the second."""
    include = [_one(second), _one(first, position=[position, 0])]
    return _prompt("position", f"{article(first)} {position} {article(second)}", include)


def attributed(first: str, color: str, second: str, other: str) -> Prompt:
    """Two objects, each of a colour of its own."""
    words = f"{article(color)} {first} and {article(other)} {second}"
    return _prompt("color_attr", words, [_one(first, color=color), _one(second, color=other)])


def content(prompt: Prompt) -> str:
    """Content that is asked for, whatever the order of the words.

    Equal for "a cat and a dog" and "a dog and a cat", and for "a cat left of a dog" and "a dog right of a cat".
    """
    include: Sequence[Mapping[str, Any]] = prompt.metadata["include"]  # type: ignore[assignment]
    place = next((entry["position"][0] for entry in include if "position" in entry), "")
    things = [f"{entry['count']} {entry.get('color', '')} {entry['class']}" for entry in include]
    if not place:
        return f"{prompt.metadata['tag']}: {', '.join(sorted(things))}"
    second, first = things
    first, second = (second, first) if place in _TURNED else (first, second)
    return f"position: {first} {_TURNED.get(place, place)} {second}"


def article(words: str) -> str:
    """Put "a" or "an" before a name."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _one(name: str, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": 1, **more}


def _prompt(tag: str, words: str, include: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> Prompt:
    return Prompt(f"a photo of {words}", {"tag": tag, "include": include, **(more or {})})
