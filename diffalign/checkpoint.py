"""Checkpoints: own weights of every policy, optimizers, step. Written to a temporary name, synced and renamed."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file

from .core import AlignmentLoop, CheckpointError, Hook, Policy, Report


def _policies(loop: AlignmentLoop) -> dict[str, Policy]:
    average = loop.average.policy if loop.average is not None else None
    named = {**loop.objective.policies(), **loop.trained()}
    return named if average is None else {**named, "average": average}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save(loop: AlignmentLoop, folder: Path, step: int, config: str) -> None:
    """Write a checkpoint to `folder`, which appears complete or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for role, policy in _policies(loop).items():
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in policy.own_parameters().items()}
        save_file(tensors, temporary / f"{role}.safetensors")
    for role, optimizer in loop.running.items():
        torch.save(optimizer.state_dict(), temporary / f"{role}.optimizer.pt")
    files = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
    manifest = {"step": step, "reward": loop.reward, "files": files, "config": hashlib.sha256(config.encode()).hexdigest()}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and unchanged.

    Raises:
        CheckpointError: it is damaged; the message names the file.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        for name, digest in manifest["files"].items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name} must have the content that its manifest names; it was changed or cut off")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
    return manifest


@torch.no_grad()
def load(loop: AlignmentLoop, folder: Path) -> int:
    """Restore policies and optimizers in place; returns the steps done.

    Raises:
        CheckpointError: it is damaged, or holds other tensors than this run has.
    """
    manifest = read_manifest(folder)
    for role, policy in _policies(loop).items():
        file = folder / f"{role}.safetensors"
        if not file.exists():
            raise CheckpointError(f"{folder} must hold weights for {role!r}; it has {', '.join(manifest['files'])}")
        load_weights(policy, file)
    for role, optimizer in loop.running.items():
        optimizer.load_state_dict(torch.load(folder / f"{role}.optimizer.pt", weights_only=True))
    loop.reward = manifest["reward"]
    return int(manifest["step"])


@torch.no_grad()
def load_weights(policy: Policy, file: Path) -> None:
    """Copy the tensors of a checkpoint file into a policy.

    Raises:
        CheckpointError: names or shapes differ.
    """
    tensors, mine = load_file(file), policy.own_parameters()
    if tensors.keys() != mine.keys():
        odd = sorted(tensors.keys() ^ mine.keys())
        raise CheckpointError(f"{file} must hold the policy's {len(mine)} own tensors; {len(odd)} names differ (first: {odd[0]!r})")
    for name, parameter in mine.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(f"{file}: {name!r} must have shape {tuple(parameter.shape)}; got {tuple(tensors[name].shape)}")
        parameter.copy_(tensors[name])


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder that are whole, oldest first."""
    found = []
    for candidate in sorted(folder.glob("step-*")):
        if candidate.is_dir() and candidate.suffix != ".tmp":
            try:
                read_manifest(candidate)
            except CheckpointError as error:
                print(f"skipping a damaged checkpoint: {error}")
            else:
                found.append(candidate)
    return found


@attrs.define(eq=False)
class Checkpoints(Hook):
    """Writes `step-NNNNNN/` every `every` steps, at the end, and when the run is interrupted.

    Args:
        folder: of the run
        every: steps between checkpoints
        config: resolved configuration, whose hash the manifest holds
        keep: how many of the last are kept
    """

    folder: Path
    every: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    config: str = ""
    keep: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    _saved: int | None = attrs.field(default=None, init=False)

    def restore(self, loop: AlignmentLoop) -> int:
        """Load the last whole checkpoint of the folder; returns the step to start at.

        Raises:
            CheckpointError: there is none.
        """
        found = complete_checkpoints(self.folder)
        if not found:
            raise CheckpointError(f"{self.folder} must hold a checkpoint step-*/ to resume from; there is none")
        return load(loop, found[-1])

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if (report.step + 1) % self.every == 0:
            self._save(loop, report.step + 1)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        # weights and optimizers fit together at the end, and when a signal waited for the end of its step; not after an error
        if (error is None or isinstance(error, KeyboardInterrupt)) and step != self._saved:
            self._save(loop, step)

    def _save(self, loop: AlignmentLoop, step: int) -> None:
        if loop.devices.rank == 0:
            save(loop, self.folder / f"step-{step:06d}", step, self.config)
            for old in sorted(self.folder.glob("step-??????"))[: -self.keep]:
                shutil.rmtree(old)
        self._saved = step
