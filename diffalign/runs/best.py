"""The best checkpoint of a run: what it is judged by, and where it is kept."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import attrs

from ..core import AlignmentLoop, CheckpointError
from ..durable import publish
from .snapshot import read_manifest

BEST = "best"
TRAINING = "reward of the steps before it"


@attrs.frozen
class Score:
    """By which checkpoints are compared.

    Args:
        value: larger is better
        measure: what it is; values of different measures are not compared
    """

    value: float
    measure: str


def training_score(rewards: Sequence[float]) -> Score | None:
    """The mean of the raw rewards of some steps; None where there are none."""
    return Score(sum(rewards) / len(rewards), TRAINING) if rewards else None


def evaluated(loop: AlignmentLoop) -> bool:
    """True if the run is evaluated on held-out prompts while it trains: once at its end is nothing to compare by."""
    return any(result.repeated for result in loop.evaluations)


def held_out_score(loop: AlignmentLoop, step: int) -> Score | None:
    """The mean reward on held-out prompts after so many steps; None where the weights of that step have not been evaluated.

    The rewards are those of the run, with the aggregation's weights, as in the metric `reward`; a prompt has the sum over the rewards
    that apply to it.
    """
    result = next((result for result in loop.evaluations if result.step == step), None)
    if result is None:
        return None
    sums = {name: result.rewards[name].mean(dim=1).double().sum() for name in loop.named_rewards() if name in result.rewards}
    weights = dict.fromkeys(sums, 1.0) if loop.aggregation.weights is None else loop.aggregation.weights
    value = sum(weight * float(sums[name]) for name, weight in weights.items() if name in sums) / len(result.prompts)
    texts = hashlib.sha256("\n".join(map(str, result.prompts)).encode()).hexdigest()[:8]
    settings = ", ".join(f"{name} {number}" for name, number in result.settings.items())
    return Score(value, f"held-out reward on {len(result.prompts)} prompts {texts}, {settings}")


def value_to_beat(folder: Path, measure: str) -> float:
    """The score of the best in a run folder; -inf where there is none, or it was found by another measure."""
    try:
        manifest = read_manifest(folder / BEST)
        return float(manifest["score"]) if manifest.get("measure", TRAINING) == measure else -math.inf
    except (CheckpointError, KeyError, TypeError):
        return -math.inf


def keep(new: Path, score: Score) -> None:
    """Keep a checkpoint as the best of its run, in place of the one before; costs no room where the file system has hard links."""
    temporary = new.with_name(f"{BEST}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in new.iterdir():
        if file.name == "manifest.json":
            manifest = {**json.loads(file.read_text()), "score": score.value, "measure": score.measure}
            (temporary / file.name).write_text(json.dumps(manifest, indent=1))
            continue
        try:
            os.link(file, temporary / file.name)
        except OSError:  # a file system without hard links
            shutil.copy2(file, temporary / file.name)
    publish(temporary, new.with_name(BEST))
