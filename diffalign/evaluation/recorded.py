"""Files that a run folder has recorded: metrics by step, evaluations by step and prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pairing import Column

Entries = Sequence[Mapping[str, Any]]


def read(file: Path) -> str:
    """Read the text of a file; "" if there is none."""
    return file.read_text(encoding="utf-8") if file.exists() else ""


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines. A last line that a crash has cut off is left out."""
    lines = read(file).splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_list(file: Path) -> Entries:
    """Read the objects of a JSON file that holds a list."""
    entries: Entries = json.loads(read(file) or "[]")
    return entries


def measures(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, kind and name of every measure that an evaluation has by prompt."""
    return [(f"{kind.removesuffix('s')} {name}", kind, name) for kind in ("rewards", "diversity") for name in entry[kind]]


def basis(entry: Mapping[str, Any]) -> tuple[object, ...]:
    """Prompts and settings of an evaluation, which must be equal in evaluations that are compared prompt by prompt."""
    prompts = tuple(row.get("prompt") for row in entry.get("by_prompt", ()))
    return prompts, tuple(entry.get(name) for name in ("samples", "steps", "seed"))


def comparable(entries: Entries) -> Entries:
    """Evaluations that can be compared with the last of them. A resume may have changed the prompts or the settings."""
    return [entry for entry in entries if basis(entry) == basis(entries[-1])]


def places(entry: Mapping[str, Any], kind: str, name: str) -> list[int]:
    """Places of the prompts that have a number of one measure."""
    return [place for place, row in enumerate(entry.get("by_prompt", ())) if name in row.get(kind, ())]


def by_prompt(entry: Mapping[str, Any], kind: str, name: str) -> Tensor:
    """Values of one measure by prompt: [P], fewer where a reward does not apply to all prompts."""
    return torch.tensor([entry["by_prompt"][place][kind][name] for place in places(entry, kind, name)], dtype=torch.float64)


def columns(entry: Mapping[str, Any]) -> dict[str, Column]:
    """Label -> numbers by prompt of every measure of an evaluation, to be paired with those of another one."""
    return {
        label: Column(torch.tensor(places(entry, kind, name), dtype=torch.int64), by_prompt(entry, kind, name))
        for label, kind, name in measures(entry)
    }
