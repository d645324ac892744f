"""Policy of a run with the weights of one of its checkpoints. Rewards, prompts and objective are not built."""

from pathlib import Path

import torch

from diffalign.config import Run
from diffalign.config.blueprint import build
from diffalign.core import CheckpointError, ConfigError, Policy
from diffalign.runs.snapshot import load_weights, read_manifest

_ROLES = ("average", "policy", "generator")
"""Roles in order of preference when none is given: the average, the policy, or the generator of a distillation."""


def trained_policy(job: Run, checkpoint: Path, role: str | None = None) -> Policy:
    """Build the run's policy and load a checkpoint into it.

    Args:
        job: the run
        checkpoint: a complete checkpoint of this run
        role: role whose weights are loaded; None takes the average, else the policy

    Raises:
        CheckpointError: it is damaged, or holds no weights of the default roles.
        ConfigError: it holds no weights of the given role.
    """
    present = sorted(name.removesuffix(".safetensors") for name in read_manifest(checkpoint)["files"] if name.endswith(".safetensors"))
    chosen = role or next((name for name in _ROLES if name in present), None)
    if chosen not in present:
        raise (ConfigError if role else CheckpointError)(
            f"{checkpoint} must hold weights of the role {chosen or 'policy'!r}; it has {', '.join(present)}. Give --role."
        )
    torch.manual_seed(job.tree["seed"])
    policy: Policy = build(job.tree["policy"], {})
    load_weights(policy, checkpoint / f"{chosen}.safetensors")
    return policy
