"""Best checkpoint of a run: the score that decides, and where it is kept."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import attrs

from ..core import AlignmentLoop, CheckpointError, Raw
from ..durable import publish
from .snapshot import read_manifest

BEST = "best"
TRAINING = "reward of the steps before it"


@attrs.frozen
class Score:
    """Score by which checkpoints are compared.

    Args:
        value: larger is better
        measure: description of the value; only scores of the same measure are compared
    """

    value: float
    measure: str


def training_score(rewards: Sequence[float]) -> Score | None:
    """Mean of the raw rewards of some steps; None without steps."""
    return Score(sum(rewards) / len(rewards), TRAINING) if rewards else None


def evaluated(loop: AlignmentLoop) -> bool:
    """True if the run is evaluated on held-out prompts while it trains. One evaluation at the end compares no checkpoints."""
    return any(result.repeated for result in loop.evaluations)


def held_out_score(loop: AlignmentLoop, step: int) -> Score | None:
    """Mean reward on held-out prompts after `step` steps; None if the weights of that step have not been evaluated.

    The rewards are those of the run, with the aggregation's weights, as in the metric `reward`.
    """
    result = next((result for result in loop.evaluations if result.step == step), None)
    if result is None:
        return None
    parts = {name: result.rewards[name].flatten().double() for name in loop.named_rewards()}
    value = Raw(loop.aggregation.weights)(parts, next(iter(parts.values()))).mean()
    texts = hashlib.sha256("\n".join(map(str, result.prompts)).encode()).hexdigest()[:8]
    settings = ", ".join(f"{name} {number}" for name, number in result.settings.items())
    return Score(float(value), f"held-out reward on {len(result.prompts)} prompts {texts}, {settings}")


def value_to_beat(folder: Path, measure: str) -> float:
    """Score of the best checkpoint in a run folder; -inf if there is none, or if it was judged by another measure."""
    try:
        manifest = read_manifest(folder / BEST)
        return float(manifest["score"]) if manifest.get("measure", TRAINING) == measure else -math.inf
    except (CheckpointError, KeyError, TypeError):
        return -math.inf


def keep(new: Path, score: Score) -> None:
    """Keep a checkpoint as the best of its run, in place of the previous one. With hard links it takes no extra disk space."""
    temporary = new.with_name(f"{BEST}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in new.iterdir():
        if file.name == "manifest.json":
            manifest = {**json.loads(file.read_text(encoding="utf-8")), "score": score.value, "measure": score.measure}
            (temporary / file.name).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            continue
        try:
            os.link(file, temporary / file.name)
        except OSError:  # a file system without hard links
            shutil.copy2(file, temporary / file.name)
    publish(temporary, new.with_name(BEST))
