"""Best checkpoint of a run: the score that decides, and where it is kept."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from ..core import AlignmentLoop, CheckpointError, Prompt, RewardFunction
from ..core.scoring import OfSources
from ..durable import publish
from .snapshot import read_manifest

BEST = "best"
TRAINING = "reward of the steps before it"
_LACKING = ", without "


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
    """True if rewards of the run score held-out prompts while it trains. One evaluation at the end compares no checkpoints."""
    return any(result.repeated and not result.rewards.keys().isdisjoint(_weights(loop)) for result in loop.evaluations)


def held_out_score(loop: AlignmentLoop, step: int) -> Score | None:
    """Mean reward on held-out prompts after `step` steps; None if the weights of that step have not been evaluated, or were not scored.

        sum over rewards of weight * mean over the prompts that have a score * share of the prompts that the reward belongs to

    The rewards are those of the run, with the aggregation's weights, as in the metric `reward`. A reward belongs to all prompts, or to
    those of its sources. One without a score is left out, and the measure says so.
    """
    result = next((result for result in loop.evaluations if result.step == step), None)
    weights, rewards = _weights(loop), loop.named_rewards()
    if result is None or result.rewards.keys().isdisjoint(weights):
        return None
    count = len(result.prompts)
    belonging = {name: sum(_belongs(rewards[name], prompt) for prompt in result.prompts) for name in weights}
    scores = {name: result.rewards[name].mean(dim=1).double() for name in weights if name in result.rewards}
    value = sum(weights[name] * float(each.sum()) * (belonging[name] / len(each)) for name, each in scores.items()) / count
    texts = hashlib.sha256("\n".join(map(str, result.prompts)).encode()).hexdigest()[:8]
    settings = ", ".join(f"{name} {number}" for name, number in result.settings.items())
    absent = "".join(f"{_LACKING}{name}" for name, prompts in belonging.items() if prompts and name not in scores)
    return Score(value, f"held-out reward on {count} prompts {texts}, {settings}{absent}")


def _weights(loop: AlignmentLoop) -> Mapping[str, float]:
    """Weights of the rewards of the run by name."""
    rewards, weights = loop.named_rewards(), loop.aggregation.weights
    return dict.fromkeys(rewards, 1.0) if weights is None else {name: weight for name, weight in weights.items() if name in rewards}


def _belongs(reward: RewardFunction, prompt: Prompt) -> bool:
    return not isinstance(reward, OfSources) or reward.applies(prompt)


def value_to_beat(folder: Path, measure: str) -> float:
    """Score of the best checkpoint in a run folder; -inf if there is none, or if it was judged by another measure.

    It is inf where the measure lacks rewards that the best was judged by: such a score replaces nothing.
    """
    try:
        manifest = read_manifest(folder / BEST)
        kept, whole = manifest.get("measure", TRAINING), measure.partition(_LACKING)[0]
        if kept != measure:
            return math.inf if kept == whole else -math.inf
        return float(manifest["score"])
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
