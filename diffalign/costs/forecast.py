"""Forecast of the costs of a run, before it runs: samples, network rows, memory."""

import gc
from collections.abc import Iterator

import torch
from torch import nn

from ..core import AlignmentLoop
from ..core.budget import rows_of
from ..core.guided import evaluations
from ..samplers import Branches, Branching
from .activations import Activations
from .beside import beside_bytes
from .kept import Kept
from .sizes import size, tensor_bytes
from .sizes import state_bytes as _state_bytes
from .updates import rows_at_once, step_rows


def forecast(loop: AlignmentLoop, total: int, activations: Activations | None = None, saved: int = 0) -> str:
    """Make a table of the costs of a step, from the plan and the weights. Nothing is run.

    Args:
        loop: the built loop
        total: steps of the run
        activations: memory of its update; None counts it
        saved: bytes that weights take less than their type says, because the run will quantise them
    """
    plan = loop.sampler.branching() if isinstance(loop.sampler, Branches) else None
    rows = [*_plan(loop, plan, total), *_training(loop), *_memory(loop, plan, activations or Activations.of(loop), saved)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _plan(loop: AlignmentLoop, plan: Branching | None, total: int) -> Iterator[tuple[str, str]]:
    prompts = loop.prompts_per_step
    if plan is None:
        yield "rollout", f"{type(loop.sampler).__name__} has no branching(), so its samples and rows are not known before it runs"
        return
    rows = rows_of(loop.sampler)
    size = loop.rollout.prompts or prompts
    sizes = [min(size, prompts - start) for start in range(0, prompts, size)]
    each = evaluations(loop.objective.behavior())
    calls = each * sum(-(-width * count // rows) if rows else 1 for count in sizes for width in plan.evaluated)
    leaves, replay = plan.leaves, plan.replay_rows
    update, every = rows_at_once(loop, plan), step_rows(loop)
    rollout, trained = each * plan.rollout_rows, evaluations(loop.objective.policy) * (update or 0)
    drawn = sum(width * children for width, children, eta in zip(plan.widths, plan.children, plan.noise_levels, strict=False) if eta > 0)
    yield "leaves per prompt", f"{leaves}"
    yield "samples per step", f"{leaves * prompts} ({prompts} prompts), {leaves * prompts * total:,} in {total} steps"
    yield "rollout", f"{rollout} network rows a prompt, {rollout * prompts} a step in {calls} calls"
    if update is None:
        yield (
            "update",
            f"not known: no step of the rollout is stochastic, and {type(loop.objective).__name__} does not say what it evaluates",
        )
    elif every is not None:
        passes = "losses of the trained roles" if len(loop.trained()) > 1 else "losses"
        trained, frozen = sum(every.trained), sum(every.frozen)
        yield (
            "update",
            (
                f"{trained} network rows a prompt with gradient, in {passes} of at most {update}, and {frozen} without; "
                f"{trained * prompts} and {frozen * prompts} a step"
            ),
        )
    elif (kept := Kept.of(loop, plan, update)).spares:
        graph = evaluations(loop.objective.behavior()) * kept.rows
        rest = f"; {trained * prompts} network rows in each further update, per policy" if kept.evaluated else ""
        yield (
            "replay",
            (
                f"none in the first update: the rollout keeps the graph of {graph} network rows a prompt for {drawn} stochastic edges, "
                f"{graph * prompts} a step{rest}"
            ),
        )
    elif update == replay:
        yield "replay", f"{trained} network rows a prompt for {drawn} stochastic edges, {trained * prompts} a step, per policy and update"
    else:
        yield "update", f"{trained} network rows a prompt for {leaves} samples, {trained * prompts} a step, per policy and update"


def _training(loop: AlignmentLoop) -> Iterator[tuple[str, str]]:
    for role, policy in loop.trained().items():
        own = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
        every = sum(parameter.numel() for parameter in policy.parameters())
        optimizer = type(loop.running[role]).__name__
        yield f"trains {role}", f"{own:,} of {every:,} parameters ({own / max(every, 1):.2%}) with {optimizer}"


def _memory(loop: AlignmentLoop, plan: Branching | None, activations: Activations, saved: int) -> Iterator[tuple[str, str]]:
    weights = _loaded_bytes() or _planned_bytes(loop) - saved
    gradients = sum(tensor_bytes(p) for policy in loop.trained().values() for p in policy.trainable_parameters().values())
    state = sum(_state_bytes(optimizer) for optimizer in loop.running.values())
    entries = [("weights (text encoders and autoencoder included, rewards where they are loaded)", weights)]
    entries += [("gradients", gradients), ("optimizer state", state)]
    unknown = ""
    if plan is not None:
        policy = loop.objective.behavior().sized(activations.size)
        nodes = sum(plan.widths) * loop.prompts_per_step
        entries.append(("latents and means of a rollout, at most", 2 * nodes * 4 * torch.Size(policy.latent_shape).numel()))
        update = rows_at_once(loop, plan)
        if update is not None and activations.known:
            entries.append(_passes(loop, Kept.of(loop, plan, update), update, activations))
        else:
            unknown = ", and activations of the update, which are not known"
    yield "memory", f"about {size(sum(count for _, count in entries))}{unknown}:"
    for name, count in entries:
        yield "", f"{size(count):>9}  {name}"


def _passes(loop: AlignmentLoop, kept: Kept, update: int, activations: Activations) -> tuple[str, int]:
    prompts = loop.prompts_per_step
    chunk = min(rows_of(loop.objective) or update * prompts, update * prompts)
    taken, each = kept.bytes(activations, chunk, prompts), activations.each
    if not kept.rows:
        return f"activations of {chunk} rows{each} in the update ({activations.source})", taken
    rest = f", {'then' if kept.spares else 'and'} of {chunk} in the update" if kept.evaluated else ""
    return f"activations of {kept.rows * prompts} rows{each} whose graph the rollout keeps{rest} ({activations.source})", taken


def _loaded_bytes() -> int:
    """Bytes of all modules in this process, shared tensors once. A pipeline's other models are not parameters of the policy."""
    tensors: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and "_parameters" in vars(thing):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                tensors[tensor.data_ptr()] = 0 if tensor.is_meta else tensor_bytes(tensor)
    return sum(tensors.values())


def _planned_bytes(loop: AlignmentLoop) -> int:
    """Bytes of the weights of a run that was built without any."""
    tensors = {id(parameter): parameter for policy in loop.policies().values() for parameter in policy.parameters()}
    return sum(map(tensor_bytes, tensors.values())) + beside_bytes(loop.objective.policy).total
