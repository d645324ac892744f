"""The errors that a caller may want to catch; everything else is a ValueError or a RuntimeError with a full sentence."""


class ConfigError(ValueError):
    """A configuration that cannot be built. The command line prints it as one message and exits with 2."""


class NonFiniteError(FloatingPointError):
    """A number that is NaN or infinite, with its address. Nothing was updated."""


class RewardError(RuntimeError):
    """A reward raised, or returned something other than one finite number per image."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or that belongs to another run."""


class ContractError(RuntimeError):
    """Rollout and replay disagree before the first update: every log-prob ratio would be wrong."""
