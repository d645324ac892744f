"""Random draws by name: each is a function of (seed, step, name, prompt id, node id) and of nothing else."""

import hashlib
import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor


@attrs.frozen
class Streams:
    """The random draws of one step of one run.

    Draws do not depend on batching, chunking, order or the number of processes, so resume is exact without storing a generator.
    They are made on the CPU in float32; the caller moves them.

    Args:
        seed: seed of the run
        step: step of the run
    """

    seed: int
    step: int = 0

    def generator(self, name: str, *ids: int) -> np.random.Generator:
        """Make a new generator for one name and some integers: counter based (Philox), 128-bit key."""
        text = "\0".join([str(self.seed), str(self.step), name, *map(str, ids)])
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key))

    def normal(self, shape: Sequence[int], name: str, prompt_id: int, node_id: int) -> Tensor:
        """Unit noise for one node: [*shape], float32."""
        draw = self.generator(name, prompt_id, node_id).standard_normal(math.prod(shape), dtype=np.float32)
        return torch.from_numpy(draw).reshape(tuple(shape))

    def normals(self, shape: Sequence[int], name: str, prompt_ids: Sequence[int], node_ids: Sequence[int]) -> Tensor:
        """Unit noise for several nodes: [B, *shape], float32, row b as `normal` gives it."""
        rows = [self.normal(shape, name, prompt_id, node_id) for prompt_id, node_id in zip(prompt_ids, node_ids, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, *shape)
