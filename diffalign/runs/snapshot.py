"""State of a run on disk: written completely or not at all, read only if it is complete and unchanged."""

import copy
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core import AlignmentLoop, CheckpointError, Devices, Policy, Stateful
from ..core.budget import limited, rows_of
from ..core.spread import is_spread, spread_like, whole
from ..core.undo import stateful_parts
from ..durable import publish

_NAME = re.compile(r"step-(\d{6,})")
STATE = "state.pt"
CONFIG = "config.yaml"


@attrs.frozen(eq=False)
class RunSnapshot:
    """State of a run, on the CPU.

    Args:
        weights: own tensors of each policy
        optimizers: optimizer state by role
        state: state of the objective and of other parts that have one, torch's random generators by rank, with the accelerator's, and row
            budgets
    """

    weights: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Any]

    @classmethod
    def of(cls, loop: AlignmentLoop, state: Mapping[str, Any] | None = None) -> "RunSnapshot":
        """Collect the state. Every process of the run must call this; only the first keeps the gathered weights.

        Args:
            loop: run to collect
            state: earlier result of `state_of` in this process, if the loop's parts have changed since; None takes the present state
        """
        keep = loop.devices.rank == 0
        return cls(
            {role: _weights(policy, keep) for role, policy in loop.policies().items()},
            {role: _state(optimizer, keep) for role, optimizer in loop.running.items()},
            _of_all(loop.devices, state_of(loop) if state is None else state),
        )


def state_of(loop: AlignmentLoop) -> dict[str, Any]:
    """Copy the state of the objective and of the parts that have one, and torch's random generators of this process, one row each."""
    parts = {name: copy.deepcopy(_on_host(dict(part.state()))) for name, part in _stateful(loop).items()}
    device = loop.objective.policy.device
    drawn = {} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state(device)[None]}
    budgets = {"sampler": rows_of(loop.sampler), "objective": rows_of(loop.objective), "chunk": loop.chunk}
    return {"parts": parts, "generators": torch.get_rng_state()[None], "device_generators": drawn, "budgets": budgets}


def _of_all(devices: Devices, state: Mapping[str, Any]) -> dict[str, Any]:
    """State with the random generators of all processes by rank. Every process of the run must call this."""
    drawn = {kind: devices.gather(rows) for kind, rows in state["device_generators"].items()}
    return {**state, "generators": devices.gather(state["generators"]).clone(), "device_generators": drawn}


def save(loop: AlignmentLoop, folder: Path, step: int, config: str, score: float | None = None) -> None:
    """Write a checkpoint to `folder`, which appears completely or not at all.

    Args:
        loop: loop whose state is saved
        folder: folder of the checkpoint
        step: steps done
        config: resolved configuration; "" for a run that was composed in Python, whose checkpoints have no `config.yaml`
        score: score by which checkpoints are compared

    Raises:
        CheckpointError: it cannot be written (a full disk, a folder that is read-only).
    """
    write(RunSnapshot.of(loop), folder, {"step": step, "reward": loop.reward, "score": score}, config)


def write(snapshot: RunSnapshot, folder: Path, facts: Mapping[str, Any], config: str) -> None:
    """Write a snapshot to disk: the half of `save` that one process does.

    Args:
        snapshot: state of the run
        folder: folder of the checkpoint
        facts: entries of the manifest
        config: see `save`
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for role, tensors in snapshot.weights.items():
            save_file(dict(tensors), temporary / f"{role}.safetensors")
        for role, state in snapshot.optimizers.items():
            torch.save(dict(state), temporary / f"{role}.optimizer.pt")
        torch.save(dict(snapshot.state), temporary / STATE)
        if config:
            (temporary / CONFIG).write_text(config, encoding="utf-8")
        files = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        manifest = {**facts, "files": files, "config": hashlib.sha256(config.encode()).hexdigest()}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        publish(temporary, folder)
    except Exception as error:  # for a full disk, safetensors and torch raise exceptions of their own
        shutil.rmtree(temporary, ignore_errors=True)
        found = complete_checkpoints(folder.parent, quiet=True)
        last = f"the last good one is {found[-1]}" if found else "there is none yet"
        raise CheckpointError(
            f"checkpoint {folder} cannot be written: {_reason(error)}. Of those before, {last}; make room and resume."
        ) from error


def _reason(error: Exception) -> str:
    """Why a file could not be written. Of a full disk torch says only the line of its own source that found fewer bytes than it wrote."""
    cut = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return f"the disk is full, or a quota is reached (torch: {str(error).splitlines()[0]})" if cut else str(error)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and check that all its files are there and unchanged.

    Raises:
        CheckpointError: the checkpoint is damaged; the message names the file.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name} must have the content that its manifest names; it was changed or cut off")
        int(manifest["step"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
    return manifest


@torch.no_grad()
def load(loop: AlignmentLoop, folder: Path) -> int:
    """Restore policies, optimizers and state in place; returns the number of steps done.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors are not those of this run.
    """
    manifest = read_manifest(folder)
    for role, policy in loop.policies().items():
        _require(folder, f"{role}.safetensors", manifest)
        load_weights(policy, folder / f"{role}.safetensors")
    for role, optimizer in loop.running.items():
        _require(folder, f"{role}.optimizer.pt", manifest)
        state = _plain(folder / f"{role}.optimizer.pt")
        try:
            optimizer.load_state_dict(_spread_state(state, optimizer))
        except ValueError as error:
            raise CheckpointError(f"{folder} was written with another optimizer of {role!r}: {error}") from error
    if STATE in manifest["files"]:
        _restore(loop, _plain(folder / STATE))
    loop.reward = manifest["reward"]
    return int(manifest["step"])


@torch.no_grad()
def load_weights(policy: Policy, file: str | Path) -> None:
    """Copy the tensors of a checkpoint file into a policy.

    Args:
        policy: policy that is built as in the run
        file: weights of one role in a checkpoint, such as runs/mine/step-000100/policy.safetensors

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
        parameter.copy_(spread_like(tensors[name], parameter))


def checkpoints(folder: Path) -> list[Path]:
    """Folders of a run folder that are named like a checkpoint, complete or not, in the order of steps."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Number of the step in the name of a checkpoint."""
    name = _NAME.fullmatch(checkpoint.name)
    assert name is not None
    return int(name[1])


def complete_checkpoints(folder: Path, quiet: bool = False) -> list[Path]:
    """Complete checkpoints of a run folder under their names, oldest first. Nothing is changed: the run may be writing the next one.

    Args:
        folder: folder of the run
        quiet: print nothing about damaged checkpoints
    """
    return [candidate for candidate in checkpoints(folder) if is_whole(candidate, quiet)]


def going_on(folder: Path, advice: str) -> str:
    """Say of a run that ended early which checkpoint is its last.

    Args:
        folder: folder of the run
        advice: sentence that says how it is continued from there
    """
    saved = complete_checkpoints(folder, quiet=True)
    return f"the last checkpoint is {saved[-1]}. {advice}" if saved else f"there is no checkpoint in {folder} yet"


def name_complete(folder: Path) -> None:
    """Rename complete checkpoints that still have their temporary name, after a crash. It must not be done while a run trains there."""
    for temporary in folder.glob("step-*.tmp"):
        target = temporary.with_suffix("")
        if _NAME.fullmatch(target.name) and not target.exists() and _written_at(temporary) == step_of(target):
            with suppress(FileNotFoundError):  # another process of the run was faster
                temporary.rename(target)


def _written_at(folder: Path) -> int | None:
    """Step of a checkpoint; None if it is not complete."""
    try:
        return int(read_manifest(folder)["step"])
    except CheckpointError:
        return None


def is_whole(folder: Path, quiet: bool) -> bool:
    """True if a checkpoint is complete and unchanged; if not, the reason is printed."""
    try:
        read_manifest(folder)
    except CheckpointError as error:
        if not quiet and folder.exists():  # a run that trains has removed an old one
            print(f"skipping a damaged checkpoint: {error}")
        return False
    return True


def _stateful(loop: AlignmentLoop) -> dict[str, Stateful]:
    """Parts of a run that have state."""
    others = {"aggregation": loop.aggregation, "prompts": loop.prompts}
    stateful = {name: part for name, part in others.items() if isinstance(part, Stateful)}
    return {"objective": loop.objective, **stateful_parts(loop.sampler), **stateful}


def _restore(loop: AlignmentLoop, state: Mapping[str, Any]) -> None:
    for name, part in _stateful(loop).items():
        if name in state["parts"] and (state["parts"][name] or name != "objective"):
            part.restore(state["parts"][name])
    if loop.devices.rank < len(state["generators"]):
        torch.set_rng_state(state["generators"][loop.devices.rank].clone())  # torch reads the wrong memory of a view, and crashes
    if "budgets" in state:  # older checkpoints have none
        _restore_budgets(loop, state["budgets"])
    device = loop.objective.policy.device
    drawn = state.get("device_generators", {}).get(device.type, ())  # older checkpoints have none
    if loop.devices.rank < len(drawn):
        torch.get_device_module(device).set_rng_state(drawn[loop.devices.rank].clone(), device)


def _restore_budgets(loop: AlignmentLoop, budgets: Mapping[str, Any]) -> None:
    """Take the row budgets that the run had found, where none are given: calls of other shapes would round differently."""
    if rows_of(loop.sampler) is None:
        loop.sampler = limited(loop.sampler, budgets["sampler"])
    if rows_of(loop.objective) is None:
        limited(loop.objective, budgets["objective"])
    loop.chunk = min(loop.chunk, budgets["chunk"])


def _plain(file: Path) -> Any:
    """Read tensors and plain values. Reading a checkpoint never runs code from it."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} must hold only tensors and plain values: {str(error).splitlines()[0]}") from error


def _weights(policy: Policy, keep: bool) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, parameter in policy.own_parameters().items():
        gathered = whole(parameter)
        if keep:
            weights[name] = gathered.to("cpu", copy=True).contiguous()
    return weights


def _state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Optimizer `state_dict` with sharded tensors gathered, so that a checkpoint does not depend on the number of processes."""
    state = optimizer.state_dict()
    entries: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and is_spread(value):
                gathered = whole(value)
                if keep:
                    entries.setdefault(index, {})[name] = gathered.cpu()
            else:
                entries.setdefault(index, {})[name] = _on_host(value)
    return {**state, "state": entries}


def _on_host(state: Any) -> Any:
    """Copy of a state with its tensors on the CPU, so that machines without that device can read the checkpoint."""
    return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, state)


def _spread_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of a checkpoint, sharded like the weights that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        entries[index] = dict(values)
        if index >= len(parameters) or not is_spread(parameters[index]):
            continue
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                entries[index][name] = spread_like(value, parameters[index])
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise CheckpointError(
                    f"the optimizer's {name!r} of shape {tuple(value.shape)} cannot be sharded like its weights, of shape "
                    f"{tuple(parameters[index].shape)}. Resume without --shard, or with an optimizer whose state has that shape."
                )
    return {**state, "state": entries}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    if name not in manifest["files"]:
        raise CheckpointError(f"{folder} must hold {name!r}; it has {', '.join(manifest['files'])}")
