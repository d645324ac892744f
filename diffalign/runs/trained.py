"""Policy of a run with the weights of one of its checkpoints. Rewards, prompts and objective are not built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffalign.config import Run
from diffalign.config.blueprint import build
from diffalign.core import CheckpointError, ConfigError, Policy
from diffalign.export.unwrapping import inwards
from diffalign.runs.snapshot import load_weights, read_manifest

_ROLES = ("average", "policy", "generator")
"""Roles in order of preference when none is given: the average, the policy, or the generator of a distillation."""


def trained_policy(job: Run, checkpoint: Path | None, role: str | None = None) -> Policy:
    """Build the run's policy and load a checkpoint into it.

    The fake and the teacher of a few-step student are policies without the student around them: the policy inside is then returned.

    Args:
        job: the run
        checkpoint: a complete checkpoint of this run; None leaves the initial weights
        role: role whose weights are loaded; None takes the average, else the policy

    Raises:
        CheckpointError: it is damaged, or holds no weights of the default roles.
        ConfigError: it holds no weights of the given role, or they are of another network.
    """
    torch.manual_seed(job.tree["seed"])
    policy: Policy = build(job.tree["policy"], {})
    if checkpoint is None:
        return policy
    manifest = read_manifest(checkpoint)
    present, chosen = _roles(manifest), role or evaluated_role(manifest)
    if chosen not in present:
        raise (ConfigError if role else CheckpointError)(
            f"{checkpoint} must hold weights of the role {chosen or 'policy'!r}; it has {', '.join(present)}. Give --role."
        )
    holder = _holder(policy, checkpoint, chosen)
    if holder is None and role:
        fitting = [name for name in present if _holder(policy, checkpoint, name) is not None]
        raise ConfigError(
            f"the role {role!r} must have the weights of the run's policy, or of one inside it; those in {checkpoint} are of another "
            f"network, which only the run builds. Give --role with one of {', '.join(fitting) or 'none'}."
        )
    loaded = policy if holder is None else holder
    load_weights(loaded, checkpoint / f"{chosen}.safetensors")
    return loaded


def evaluated_role(manifest: Mapping[str, Any]) -> str | None:
    """Role whose weights the run evaluates: the average if there is one, else the policy.

    Args:
        manifest: manifest of a checkpoint

    Returns:
        Its name; None if the checkpoint holds neither.
    """
    return next((name for name in _ROLES if name in _roles(manifest)), None)


def _roles(manifest: Mapping[str, Any]) -> list[str]:
    """Roles whose weights a checkpoint holds."""
    return sorted(name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors"))


def _holder(policy: Policy, checkpoint: Path, role: str) -> Policy | None:
    """The policy, or the outermost one inside it, that has the tensors of a role by their names; None if none has."""
    with safe_open(checkpoint / f"{role}.safetensors", framework="pt") as file:
        names = set(file.keys())
    return next((inner for inner in inwards(policy) if inner.own_parameters().keys() == names), None)
