"""Comparison of two configurations: do they describe the same run?"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..config.parts import find, import_path

SURROUNDINGS = (
    *("folder", "hooks", "evaluation", "trackers", "checkpoint_every", "checkpoint_keep", "keep_images"),
    *("rollout", "chunk", "check_rows"),
)
"""Keys that may change when a run is resumed: what is written, what is watched, how much is computed at once."""

ANYWHERE = ("rows", "device")
"""Names of arguments that change no number in any part: row budgets and devices."""


def differences(before: str, after: str) -> list[tuple[str, str, str]]:
    """List the values that make two resolved configurations different runs.

    The keys in `SURROUNDINGS` and all arguments named in `ANYWHERE` are ignored. Two import paths of one object are equal.

    Args:
        before, after: YAML

    Returns:
        Dotted path, value before and value after, as YAML writes them; "-" if a side has no value.
    """
    old, new = (dict(_leaves(_identity(yaml.safe_load(text) or {}))) for text in (before, after))
    paths = [*old, *(path for path in new if path not in old)]
    return [
        (path, _shown(old, path), _shown(new, path))
        for path in paths
        if _shown(old, path) != _shown(new, path) and not _are_one_file(old.get(path), new.get(path))
    ]


def _identity(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in SURROUNDINGS}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        if key not in ANYWHERE:
            yield from _leaves(_canonical(inner) if key == "class_path" else inner, f"{path}.{key}" if path else str(key))
    if not entries or not value:
        yield path, value


def _are_one_file(before: Any, after: Any) -> bool:
    """True for two paths that lead to one place, of which one may be relative: a file that a run made is looked up as a whole path."""
    texts = isinstance(before, str) and isinstance(after, str) and os.sep in before and os.sep in after
    return texts and Path(before).absolute() == Path(after).absolute()


def _canonical(path: Any) -> Any:
    """Present import path of an object; a path that leads to nothing stays as it is."""
    try:
        return import_path(find(path), path)
    except LookupError:
        return path


def _shown(leaves: dict[str, Any], path: str) -> str:
    return str(yaml.safe_dump(leaves[path], default_flow_style=True)).removesuffix("\n...\n").strip() if path in leaves else "-"
