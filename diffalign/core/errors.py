"""Errors that a caller may want to catch. Every other error is a ValueError or a RuntimeError with a full sentence."""

from collections.abc import Mapping

import attrs
from torch import Tensor

from .types import ScoredBatch, TrajectoryBatch


@attrs.frozen(eq=False)
class Evidence:
    """Tensors and prompts to look at after an error.

    Args:
        step: step of the run
        roles: roles that were being sampled or trained
        prompts: prompts of the batch, in the order of the groups
        tensors: tensors of the batch by name, on the CPU
    """

    step: int
    roles: tuple[str, ...]
    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, step: int, roles: tuple[str, ...], trajectories: TrajectoryBatch, batch: ScoredBatch | None = None) -> "Evidence":
        """Copy a forest to the CPU, with its rewards if it has been scored."""
        names = ("sigmas", "latents", "level", "parent", "prompt", "noise_level", "log_prob", "mean")
        tensors = {name: getattr(trajectories, name) for name in names}
        tensors |= {"prompt_ids": trajectories.condition.ids}
        tensors |= {f"condition/{name}": tensor for name, tensor in trajectories.condition.tensors.items()}
        if batch is not None:
            tensors |= {"rewards": batch.rewards, **batch.parts.tensors("reward")}
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return cls(step, roles, tuple(map(str, trajectories.condition.prompts)), copies)


class ConfigError(ValueError):
    """Error for a configuration that cannot be built. The command line prints it as one message and exits with 2."""


class NonFiniteError(FloatingPointError):
    """Error for a number that is NaN or infinite; the message says where it was found. No weight was updated.

    Attributes:
        evidence: the batch in which it was found
    """

    evidence: Evidence | None = None


class RewardError(RuntimeError):
    """A reward raised, or returned something other than one finite number per image."""


class NonFiniteRewardError(RewardError, NonFiniteError):
    """A reward returned NaN or an infinite number."""


class CheckpointError(RuntimeError):
    """Error for a checkpoint that is damaged, that cannot be written, or that belongs to another run."""


class UpdateError(RuntimeError):
    """Error for an update that cannot be made: memory ran out where fewer rows would not help, or losses cannot be back-propagated."""


class ContractError(RuntimeError):
    """Rollout and replay disagree before the first update: every log-prob ratio would be wrong."""


class ProcessError(RuntimeError):
    """Another process of the run has failed, or cannot be reached."""


class BrokenCallError(ProcessError):
    """This process failed inside a collective network call (weights are sharded); the other processes are blocked and cannot be told."""


class PeerFailed(Exception):  # noqa: N818  it is no error of this process
    """Signal that another process has failed. Its message arrives with the next `agree`."""


def reword(error: Exception, text: str) -> None:
    """Give an error another message. It stays the same object, of its own kind and with its evidence; its notes join the message.

    Args:
        error: error that is about to be raised again
        text: the message
    """
    notes = vars(error).get("__notes__", [])
    error.args = ("\n".join([text, *notes]),)
