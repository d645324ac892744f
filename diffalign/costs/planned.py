"""Loop of a run whose weights are not on this machine, for planning alone."""

from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from ..config import Run
from ..config.blueprint import Part
from ..core import AlignmentLoop
from ..policies import FlowMatchingPolicy
from ..policies.diffusers import Quantization
from .unloaded import saved_bytes, unloaded

NOT_PLANNED = frozenset(
    ["device", "cache", "attention", "slicing", "tiling", "family", "sharding", "variant", "revision", "subfolder", "single_file"]
)
"""Arguments of `FlowMatchingPolicy.from_pretrained` that change no size of the network and no time that is counted."""


@attrs.frozen(eq=False)
class Planned:
    """Loop without weights. It cannot do a step.

    Args:
        loop: the loop, on torch's meta device
        saved: bytes that its weights will take less once they are quantised
        rewards: names of the rewards, none of which was built
    """

    loop: AlignmentLoop
    saved: int
    rewards: tuple[str, ...]


def planned(job: Run) -> Planned:
    """Build a loop of the published shapes of its models. Rewards and the evaluation are not built, and nothing is downloaded.

    Raises:
        ConfigError: a model's shape is not known, or another part cannot be built.
    """
    loading = _Loading()
    given = job.tree["rewards"]
    names = tuple(given) if isinstance(given, dict) else (given.name.rpartition(".")[2],)
    tree = {name: _replaced(node, loading) for name, node in job.tree.items()}
    tree["rewards"] = {name: Part(f"rewards.{name}", name, _unscored, how="itself") for name in names}
    tree["evaluation"], tree["hooks"] = None, ()
    loop = attrs.evolve(job, tree=tree).build()
    return Planned(loop, sum(saved_bytes(*made) for made in loading.made), names)


@attrs.define(eq=False)
class _Loading:
    """Makes policies without weights, and keeps how each will be quantised."""

    made: list[tuple[FlowMatchingPolicy, Quantization | None]] = attrs.field(factory=list)

    def __call__(self, path: str, quantization: Quantization | None = None, **arguments: Any) -> FlowMatchingPolicy:
        policy = unloaded(path, quantization=quantization, **arguments)
        self.made.append((policy, quantization))
        return policy


def _replaced(node: Any, loading: _Loading) -> Any:
    """Replace every pipeline that would be loaded."""
    if isinstance(node, Part):
        arguments = {name: _replaced(value, loading) for name, value in node.arguments.items()}
        if node.target == FlowMatchingPolicy.from_pretrained:
            left = {name: value for name, value in arguments.items() if name not in NOT_PLANNED}
            return attrs.evolve(node, target=loading, arguments=left, linked=())
        return attrs.evolve(node, arguments=arguments)
    if isinstance(node, dict):
        return {name: _replaced(value, loading) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_replaced(value, loading) for value in node)
    return node


def _unscored(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise RuntimeError("a run that is planned without weights scores nothing")
