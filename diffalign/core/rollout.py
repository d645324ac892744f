"""The first half of a step: prompts to scored samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .interfaces import RewardFunction
from .ledger import Ledger
from .policy import Policy
from .scoring import score
from .types import TrajectoryBatch


@torch.no_grad()
def decode_and_score(
    policy: Policy, trajectories: TrajectoryBatch, rewards: Mapping[str, RewardFunction], ledger: Ledger, chunk: int, keep: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Turn the leaves of a forest into pictures and scores, `chunk` at a time.

    Args:
        policy: whose latents they are
        trajectories: K leaves
        rewards: by name
        ledger: is charged
        chunk: images that are alive at once
        keep: images that are given back

    Returns:
        Raw scores by reward name, each [K]; the first `keep` images, on the CPU.
    """
    prompts = [trajectories.condition.prompts[i] for i in trajectories.group.tolist()]
    chunks: list[dict[str, Tensor]] = []
    kept: list[Tensor] = []
    for start in range(0, len(prompts), chunk):
        with ledger.stage("decode"):
            images = policy.decode(trajectories.samples[start : start + chunk])
        with ledger.stage("reward"):
            chunks.append(score(rewards, images, prompts[start : start + chunk]))
        kept.append(images[: max(0, keep - start)].cpu())
    return {name: torch.cat([part[name] for part in chunks]) for name in rewards}, torch.cat(kept)
