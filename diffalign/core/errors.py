"""The errors that a caller may want to catch; everything else is a ValueError or a RuntimeError with a full sentence."""

from collections.abc import Mapping

import attrs
from torch import Tensor

from .types import ScoredBatch, TrajectoryBatch


@attrs.frozen(eq=False)
class Evidence:
    """The tensors and prompts to look at after an error.

    Args:
        step: of the run
        roles: whose turn it was
        prompts: of the batch, in the order of the groups
        tensors: of the batch, by name, on the CPU
    """

    step: int
    roles: tuple[str, ...]
    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, step: int, roles: tuple[str, ...], trajectories: TrajectoryBatch, batch: ScoredBatch | None = None) -> "Evidence":
        """Copy a forest, and its rewards where there are any."""
        names = ("sigmas", "latents", "level", "parent", "prompt", "noise_level", "log_prob", "mean")
        tensors = {name: getattr(trajectories, name) for name in names}
        tensors |= {"prompt_ids": trajectories.condition.ids}
        tensors |= {f"condition/{name}": tensor for name, tensor in trajectories.condition.tensors.items()}
        if batch is not None:
            tensors |= {"rewards": batch.rewards, **batch.parts.tensors("reward")}
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return cls(step, roles, tuple(map(str, trajectories.condition.prompts)), copies)


class ConfigError(ValueError):
    """A configuration that cannot be built. The command line prints it as one message and exits with 2."""


class NonFiniteError(FloatingPointError):
    """A number that is NaN or infinite, with its address. Nothing was updated.

    Attributes:
        evidence: the batch in which it was found
    """

    evidence: Evidence | None = None


class RewardError(RuntimeError):
    """A reward raised, or returned something other than one finite number per image."""


class NonFiniteRewardError(RewardError, NonFiniteError):
    """A reward returned NaN or an infinite number."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, that cannot be written, or that belongs to another run."""


class ContractError(RuntimeError):
    """Rollout and replay disagree before the first update: every log-prob ratio would be wrong."""


class ProcessError(RuntimeError):
    """Another process of the run has failed, or cannot be reached."""


class BrokenCallError(ProcessError):
    """This process has left a network call that is a collective, because weights are sharded: the others wait in it, and hear nothing."""


class PeerFailed(Exception):  # noqa: N818  it is no error of this process
    """Another process has failed; what it said comes with the next `agree`."""
