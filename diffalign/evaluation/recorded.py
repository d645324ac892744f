"""Files that a run folder has recorded: metrics by step, evaluations by step and prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def by_prompt(entry: Mapping[str, Any], kind: str, name: str) -> Tensor:
    """Values of one measure by prompt: [P]."""
    return torch.tensor([row[kind][name] for row in entry["by_prompt"]], dtype=torch.float64)
