"""The errors that a caller may want to catch; everything else is a ValueError or a RuntimeError with a full sentence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .finite import Evidence


class ConfigError(ValueError):
    """A configuration that cannot be built. The command line prints it as one message and exits with 2."""


class NonFiniteError(FloatingPointError):
    """A number that is NaN or infinite, with its address. Nothing was updated.

    Attributes:
        evidence: the batch in which it was found
    """

    evidence: "Evidence | None" = None


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
