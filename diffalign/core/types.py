"""Values that pass between the parts.

The whole package uses one convention: `x_sigma = (1 - sigma) * x_0 + sigma * noise`, velocity `v = noise - x_0`, and sigma runs from
1 (noise) to 0 (data). The adapter of a model family with another convention converts to this one.

Legend: P prompts, N nodes, K leaves (finished samples), E stochastic edges, T steps, L stored levels of a path, * latent dimensions.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Self

import attrs
import torch
from torch import Tensor

from .scores import Scores, weighed
from .streams import Streams

ROOT = -1
"""Parent index of a node without a parent."""

UNRECORDED = -1
"""Call number of a node whose sampler does not record its network calls."""

Density = Literal["squared", "mean", "sum"]
Size = tuple[int, int]
"""Height and width in pixels."""


class Prompt(str):
    """Prompt: a plain string for every function, with `metadata` for rewards that need more (target text, counts, boxes).

    `source` is the name of the source that it comes from, where a run has several; rewards may belong to some of them alone.
    """

    metadata: Mapping[str, object]
    source: str | None

    def __new__(cls, text: str, metadata: Mapping[str, object] | None = None, source: str | None = None) -> Self:
        prompt = super().__new__(cls, text)
        prompt.metadata = MappingProxyType(dict(metadata or {}))
        prompt.source = source
        return prompt

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """Return the prompt itself; turn a plain text into a prompt without metadata."""
        return text if isinstance(text, Prompt) else cls(text)

    @property
    def size(self) -> Size | None:
        """Height and width in pixels from the metadata "height" and "width"; None if the metadata have neither.

        Raises:
            ValueError: only one of them is given, or they are not whole numbers above 0.
        """
        height, width = self.metadata.get("height"), self.metadata.get("width")
        if height is None and width is None:
            return None
        if type(height) is not int or type(width) is not int or height < 1 or width < 1:
            raise ValueError(
                f"a prompt's height and width must both be whole numbers of pixels; {str(self)!r} has {height!r} and {width!r}"
            )
        return height, width

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self), dict(self.metadata), self.source))


def _prompts(texts: Iterable[str]) -> tuple[Prompt, ...]:
    return tuple(map(Prompt.of, texts))


@attrs.frozen(eq=False)
class Condition:
    """Encoded prompts. Only the policy that encoded them knows what the tensors mean.

    Args:
        prompts: the texts, length P; plain ones become prompts
        ids: [P] global prompt ids of this step. Equal texts have separate ids; random draws depend on the ids, not on the texts
        tensors: each [P, ...]; rows of different length are padded
    """

    prompts: tuple[Prompt, ...] = attrs.field(converter=_prompts)  # P
    ids: Tensor  # [P]
    tensors: Mapping[str, Tensor]  # each [P, ...]

    def __attrs_post_init__(self) -> None:
        count = len(self.prompts)
        for name, tensor in {"ids": self.ids, **{f"tensors[{key!r}]": value for key, value in self.tensors.items()}}.items():
            if tensor.ndim == 0 or len(tensor) != count:
                raise ValueError(f"Condition.{name} must have {count} rows, one per prompt; got shape {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> Size | None:
        """Image size that all prompts request; None means the policy's own size.

        Raises:
            ValueError: the prompts ask for several sizes, which cannot be one batch.
        """
        sizes = list(dict.fromkeys(prompt.size for prompt in self.prompts))
        if len(sizes) > 1:
            raise ValueError(
                f"prompts that are sampled together must ask for one size; these ask for {_shown(sizes[0])} and {_shown(sizes[1])}"
            )
        return sizes[0] if sizes else None

    def select(self, index: Tensor) -> "Condition":
        """The rows `index` [B], repeated and reordered at will."""
        host = index.cpu()
        placed = {host.device: host, index.device: index}
        for tensor in (self.ids, *self.tensors.values()):
            if tensor.device not in placed:
                placed[tensor.device] = host.to(tensor.device, non_blocking=True)
        return Condition(
            prompts=tuple(self.prompts[i] for i in host.tolist()),
            ids=self.ids[placed[self.ids.device]],
            tensors={name: tensor[placed[tensor.device]] for name, tensor in self.tensors.items()},
        )


def _shown(size: Size | None) -> str:
    return "the run's own" if size is None else f"{size[0]} x {size[1]} (height x width)"


@attrs.frozen(eq=False)
class TrajectoryBatch:
    """Forest of denoising trajectories, as flat arrays with a parent index. A chain is a tree that never branches.

    Parents come before their children, siblings are contiguous, leaves are in depth-first order. Every stochastic edge spans one
    step; several deterministic steps may be stored as one edge. A sampler that numbers its network calls (`call`) promises: the rows of
    a call were the parents of its edges, in the order of the nodes, and no others.

    Args:
        condition: condition of the P prompts
        sigmas: [T+1] the noise grid, decreasing to 0; some families start below 1
        latents: [N, *] state of each stored node, as it was rounded
        level: [N] place of each node's sigma in `sigmas`
        parent: [N] the node before, ROOT for roots
        prompt: [N] the prompt's place in `condition`
        noise_level: [N] eta of the edge into the node; 0 = deterministic, and for roots
        log_prob: [N] float64; log-probability of that edge when it was drawn, as the kernel counts; 0 where deterministic, and for roots
        mean: [E, *] mean of each stochastic edge when it was drawn, in the order of the nodes
        call: [N] number of the network call that gave the edge into the node; UNRECORDED where it is not known, and for roots

    Computed: nodes `leaves` [K], their latents `samples` [K, *], prompts `group` [K] and `roots` [K], `paths` [K, L] to them; nodes
    `stochastic` [E] that stochastic edges reach.

    Raises:
        ValueError: the shape of a field does not fit, a child comes before its parent, a level does not rise along an edge, or a
            stochastic edge spans several levels or has siblings of another noise level.
    """

    condition: Condition
    sigmas: Tensor  # [T+1]
    latents: Tensor  # [N, *]
    level: Tensor  # [N]
    parent: Tensor  # [N]
    prompt: Tensor  # [N]
    noise_level: Tensor  # [N]
    log_prob: Tensor  # [N]
    mean: Tensor  # [E, *]
    call: Tensor = attrs.field()  # [N]

    @call.default
    def _unrecorded(self) -> Tensor:
        return torch.full_like(self.level, UNRECORDED)

    def __attrs_post_init__(self) -> None:
        count = len(self.latents)
        for name in ("level", "parent", "prompt", "noise_level", "log_prob", "call"):
            shape = tuple(getattr(self, name).shape)
            if shape != (count,):
                raise ValueError(f"TrajectoryBatch.{name} must have shape ({count},), one entry per node; got {shape}")
        if self.log_prob.dtype != torch.float64:
            raise ValueError(f"TrajectoryBatch.log_prob must be float64; got {self.log_prob.dtype}")
        sigmas, level, parent, prompt, noise_level = self.sigmas.cpu(), *self._structure, self.noise_level.cpu()
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()):
            raise ValueError(f"TrajectoryBatch.sigmas must decrease strictly, at least 2 of them; got {sigmas.tolist()}")
        if bool((parent >= torch.arange(count)).any()) or bool((parent < ROOT).any()):
            raise ValueError("TrajectoryBatch.parent must point to an earlier node, or be ROOT (-1); a child stands before its parent")
        child = parent != ROOT
        if not bool((level[child] > level[parent[child]]).all()):
            raise ValueError("TrajectoryBatch.level must rise along every edge")
        if not bool((prompt[child] == prompt[parent[child]]).all()):
            raise ValueError("TrajectoryBatch.prompt must stay the same along every edge")
        noisy = noise_level > 0
        above = parent[noisy]
        if bool((above == ROOT).any()) or not bool((level[noisy] == level[above] + 1).all()):
            raise ValueError("TrajectoryBatch.noise_level may be above 0 only for an edge that spans one level; a root has no edge")
        siblings = torch.zeros_like(noise_level).scatter(0, above, noise_level[noisy])
        if not torch.equal(siblings[above], noise_level[noisy]):
            raise ValueError("TrajectoryBatch.noise_level must be equal for stochastic siblings: they are replayed as one network row")
        edges = int(noisy.sum())
        if self.mean.shape != (edges, *self.latents.shape[1:]):
            expected = (edges, *self.latents.shape[1:])
            raise ValueError(f"TrajectoryBatch.mean must have shape {expected}, one row per stochastic edge; got {tuple(self.mean.shape)}")

    @cached_property
    def _structure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Level, parent and prompt of each node on the host. All shapes depend on these alone, so the device is waited for once."""
        level, parent, prompt = torch.stack([self.level, self.parent, self.prompt]).cpu()
        return level, parent, prompt

    def _placed(self, index: Tensor) -> Tensor:
        return index.to(self.latents.device, non_blocking=True)

    @cached_property
    def leaves(self) -> Tensor:
        """Nodes on the last level, the finished samples: [K]."""
        return self._placed((self._structure[0] == len(self.sigmas) - 1).nonzero().squeeze(1))

    @cached_property
    def paths(self) -> Tensor:
        """Nodes from root to leaf: [K, L]. A path with fewer stored levels than the longest starts with ROOT."""
        level, parent, _ = self._structure
        steps, node = [], (level == len(self.sigmas) - 1).nonzero().squeeze(1)
        while bool((node != ROOT).any()):
            steps.append(node)
            node = torch.where(node == ROOT, node, parent[node.clamp(min=0)])
        return self._placed(torch.stack(steps[::-1], dim=1))

    @cached_property
    def stochastic(self) -> Tensor:
        """Nodes that were reached by a stochastic edge: [E]."""
        return self._placed((self.noise_level.cpu() > 0).nonzero().squeeze(1))

    @cached_property
    def samples(self) -> Tensor:
        """Latents of the leaves: [K, *]."""
        return self.latents[self.leaves]

    @cached_property
    def group(self) -> Tensor:
        """Prompt index of each leaf, which is the group within which it is compared: [K]."""
        return self.prompt[self.leaves]

    @cached_property
    def roots(self) -> Tensor:
        """Root node above each leaf: [K]."""
        first = (self.paths != ROOT).int().argmax(dim=1)
        return self.paths.gather(1, first[:, None]).squeeze(1)

    def path_sum(self, values: Tensor) -> Tensor:
        """Sum of a node value along each path: [N] -> [K]."""
        padded = torch.cat([values, values.new_zeros(1)])  # ROOT = -1 reads the zero
        return padded[self.paths].sum(dim=1)

    def node_mean(self, values: Tensor) -> Tensor:
        """Mean of a leaf value over the leaves below each node: [K] -> [N]; 0 for a node without leaves below."""
        inside = self.paths != ROOT
        node = self.paths[inside]
        below = values[:, None].expand_as(self.paths)[inside]
        total = values.new_zeros(len(self.latents)).index_add(0, node, below)
        count = values.new_zeros(len(self.latents)).index_add(0, node, torch.ones_like(below))
        return total / count.clamp(min=1)


@attrs.frozen
class Progress:
    """Progress of a run.

    Args:
        step: steps done before this one
        total: steps of the whole run
        reward: raw mean reward of the last step that had one, over all ranks; None before the first
    """

    step: int
    total: int
    reward: float | None = None

    @property
    def fraction(self) -> float:
        """Share of the run that is done: 0 at the first step, 1 at the last step and after it."""
        return min(1.0, self.step / max(1, self.total - 1))


def _scores(parts: Mapping[str, Tensor]) -> Scores:
    return Scores.of(parts)


@attrs.frozen(eq=False)
class ScoredBatch:
    """Trajectories with the rewards of their leaves.

    Args:
        trajectories: the forest
        rewards: [K] aggregated, finite
        parts: each [K], the raw scores by reward name, and which samples they apply to
        groups: prompt groups of this step over all ranks; losses are means over this number
        progress: progress of the run
        streams: random draws of this step
        deviation: standard deviation of the aggregated rewards of this step over all ranks; None if the batch was made by hand
        weights: the aggregation's weights by reward name; None weighs each 1
        aggregation: its name, for messages
    """

    trajectories: TrajectoryBatch
    rewards: Tensor  # [K]
    parts: Scores = attrs.field(converter=_scores)  # each [K]
    groups: int
    progress: Progress
    streams: Streams
    deviation: float | None = None
    weights: Mapping[str, float] | None = None
    aggregation: str = "the aggregation"

    @property
    def _weighed(self) -> Scores:
        """Scores of the rewards that have a weight other than 0; the others are only logged."""
        return Scores({name: self.parts.parts[name] for name in weighed(self.parts, self.weights)})

    @property
    def complete(self) -> bool:
        """True if every sample is scored for certain: some reward with a weight applies to all. The device is not asked."""
        return self._weighed.complete

    @property
    def scored(self) -> Tensor:
        """Samples to which a reward with a weight applies: [K] bool. All, where no reward has one."""
        scores = self._weighed
        if scores.complete:
            return torch.ones_like(self.rewards, dtype=torch.bool)
        return torch.stack([scores.partial(name).applies for name in scores]).any(dim=0)


@attrs.frozen(eq=False)
class Loss:
    """Loss of one micro-batch.

    Args:
        value: scalar with a graph; the values of all micro-batches add up to the loss
        metrics: name -> (sum, count), finite, which add over micro-batches and ranks

    Raises:
        ValueError: the value is no scalar tensor, or a metric is no pair of scalars.
    """

    value: Tensor  # []
    metrics: Mapping[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if not _is_scalar(self.value):
            raise ValueError(f"Loss.value must be a tensor without dimensions, as sum() gives; got {_described(self.value)}")
        metrics: Any = self.metrics
        if not isinstance(metrics, Mapping):
            raise ValueError(f"Loss.metrics must be a dict of name -> (sum, count); got {_described(metrics)}")
        for name, pair in metrics.items():
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and _is_scalar(pair[0]) and _is_count(pair[1])):
                given = ", ".join(map(_described, pair)) if isinstance(pair, tuple | list) else _described(pair)
                raise ValueError(
                    f"Loss.metrics[{name!r}] must be a pair (sum, count) of tensors without dimensions, such as (error.detach().sum(), "
                    f"torch.tensor(len(error))); got {given}"
                )


def _is_scalar(given: object) -> bool:
    return isinstance(given, Tensor) and given.ndim == 0


def _is_count(given: object) -> bool:
    return _is_scalar(given) or isinstance(given, int | float)


def _described(given: object) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__} {given!r}"[:80]
