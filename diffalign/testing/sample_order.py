"""The same batch with the samples of each prompt in another order."""

from typing import Any, cast

import attrs
import numpy as np
import torch

from diffalign.core import ROOT, ScoredBatch, Streams, TrajectoryBatch


def turned(forest: TrajectoryBatch) -> TrajectoryBatch:
    """The forest with the samples of each prompt in reverse order: all roots and siblings are turned round. The prompts keep theirs."""
    level, prompt = forest.level.tolist(), forest.prompt.tolist()
    order = torch.tensor(sorted(range(len(level)), key=lambda node: (level[node], prompt[node], -node)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    parent = forest.parent[order]
    noisy = forest.noise_level > 0
    row = (noisy.cumsum(0) - 1)[order]  # of the means, which stochastic edges alone have
    return attrs.evolve(
        forest,
        parent=torch.where(parent == ROOT, parent, place[parent.clamp(min=0)]),
        mean=forest.mean[row[noisy[order]]],
        **{name: getattr(forest, name)[order] for name in ("latents", "level", "prompt", "noise_level", "log_prob", "call")},
    )


def alike(batch: ScoredBatch) -> ScoredBatch:
    """The batch with draws that are the same for all samples of a prompt, so that only the samples themselves can make a difference."""
    streams = AlikeStreams(batch.streams.seed, batch.streams.step)
    return attrs.evolve(batch, streams=cast(Streams, streams))


@attrs.frozen
class AlikeStreams:
    """Draws like those of `Streams` that depend on no sample: of name and first id alone, with one number in all places of an array.

    Args:
        seed: seed of the run
        step: step of the run
    """

    seed: int
    step: int
    normal, normals = Streams.normal, Streams.normals

    def generator(self, name: str, *ids: int) -> np.random.Generator:
        return _Alike(Streams(self.seed, self.step).generator(name, *ids[:1]).bit_generator)


class _Alike(np.random.Generator):
    """Generator whose arrays repeat one number."""

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return _repeated(super().random(None, dtype), size, dtype)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return _repeated(super().standard_normal(None, dtype), size, dtype)


def _repeated(number: Any, size: Any, dtype: Any) -> Any:
    return number if size is None else np.full(size, number, dtype)
