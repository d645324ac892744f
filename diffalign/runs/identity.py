"""Comparison of two configurations, and of the prompts that their files hold: do they describe the same run?"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..config.parts import find, import_path
from ..core import Listed, Prompt, PromptSource

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


def listed(source: PromptSource) -> dict[str, Any] | None:
    """Count and digest of the prompts of a source, in order, with their metadata and sources; None if it cannot list them."""
    if not isinstance(source, Listed):
        return None
    digest = hashlib.sha256()
    for prompt in map(Prompt.of, source.prompts):
        told = json.dumps([str(prompt), prompt.source, _told(prompt.metadata)])
        digest.update(f"{told}\n".encode())
    return {"count": len(source.prompts), "sha256": digest.hexdigest()}


def _told(value: Any) -> Any:
    """Metadata as JSON holds it: keys of any type by their names, in order, and other objects by their type."""
    if isinstance(value, Mapping):
        return sorted([str(key), _told(inner)] for key, inner in value.items()) if value else {}
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float) else type(value).__name__


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
    if not isinstance(before, str) or not isinstance(after, str) or os.sep not in before + after or "\0" in before + after:
        return False
    return os.path.realpath(before) == os.path.realpath(after)


def _canonical(path: Any) -> Any:
    """Present import path of an object; a path that leads to nothing stays as it is."""
    try:
        return import_path(find(path), path)
    except LookupError:
        return path


def _shown(leaves: dict[str, Any], path: str) -> str:
    return str(yaml.safe_dump(leaves[path], default_flow_style=True)).removesuffix("\n...\n").strip() if path in leaves else "-"
