"""What a run will cost, before it runs: samples, network rows, memory."""

import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .core import AlignmentLoop, Policy
from .samplers import Branching


def forecast(loop: AlignmentLoop, total: int) -> str:
    """A table of what a step costs, from the plan and the weights alone; nothing is run.

    Args:
        loop: as built
        total: steps of the run
    """
    branching = getattr(loop.sampler, "branching", None)
    plan = branching() if callable(branching) else None
    rows = [*_plan(loop, plan, total), *_training(loop), *_memory(loop, plan)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _plan(loop: AlignmentLoop, plan: Branching | None, total: int) -> Iterator[tuple[str, str]]:
    prompts = loop.prompts_per_step
    if plan is None:
        yield "rollout", f"{type(loop.sampler).__name__} has no branching(), so its samples and rows are not known before it runs"
        return
    rows = getattr(loop.sampler, "rows", None)
    calls = sum(-(-width * prompts // rows) if rows else 1 for width in plan.widths[:-1])
    leaves, rollout, replay = plan.leaves, plan.rollout_rows, plan.replay_rows
    drawn = sum(width * children for width, children, eta in zip(plan.widths, plan.children, plan.noise_levels, strict=False) if eta > 0)
    yield "leaves per prompt", f"{leaves}"
    yield "samples per step", f"{leaves * prompts} ({prompts} prompts), {leaves * prompts * total:,} in {total} steps"
    yield "rollout", f"{rollout} network rows a prompt, {rollout * prompts} a step in {calls} calls"
    yield "replay", f"{replay} network rows a prompt for {drawn} stochastic edges, {replay * prompts} a step, per policy and update"


def _training(loop: AlignmentLoop) -> Iterator[tuple[str, str]]:
    for role, policy in loop.trained().items():
        own = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
        every = sum(parameter.numel() for parameter in policy.parameters())
        optimizer = type(loop.running[role]).__name__
        yield f"trains {role}", f"{own:,} of {every:,} parameters ({own / max(every, 1):.2%}) with {optimizer}"


def _memory(loop: AlignmentLoop, plan: Branching | None) -> Iterator[tuple[str, str]]:
    weights = _loaded_bytes()
    gradients = sum(_bytes(p) for policy in loop.trained().values() for p in policy.trainable_parameters().values())
    state = sum(_state_bytes(optimizer) for optimizer in loop.running.values())
    entries = [("weights (all that is loaded, text encoders and autoencoder included)", weights)]
    entries += [("gradients", gradients), ("optimizer state", state)]
    if plan is not None:
        policy = loop.objective.behavior()
        nodes = sum(plan.widths) * loop.prompts_per_step
        entries.append(("latents and means of a rollout, at most", 2 * nodes * 4 * torch.Size(policy.latent_shape).numel()))
        replayed = plan.replay_rows * loop.prompts_per_step
        chunk = min(getattr(loop.objective, "rows", None) or replayed, replayed)
        entries.append(
            (f"activations of {chunk} rows in the update (a guess: the inputs of the linear layers)", chunk * _activation_bytes(policy))
        )
    yield "memory", f"about {_size(sum(size for _, size in entries))}:"
    for name, size in entries:
        yield "", f"{_size(size):>9}  {name}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _loaded_bytes() -> int:
    """Bytes of all modules that are alive, shared tensors once: a pipeline's other models are no parameters of the policy."""
    tensors: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and "_parameters" in vars(thing):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                tensors[tensor.data_ptr()] = _bytes(tensor)
    return sum(tensors.values())


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer will keep per parameter, found out on a parameter of 64 numbers."""
    probe = nn.Parameter(torch.zeros(8, 8))
    probe.grad = torch.zeros_like(probe)
    twin = type(optimizer)([probe], **{name: value for name, value in optimizer.defaults.items() if name in _arguments(optimizer)})
    try:
        twin.step()
    except (RuntimeError, TypeError):  # one that needs a closure; its state is not known
        return 0
    kept = sum(_bytes(value) for value in twin.state[probe].values() if isinstance(value, Tensor) and value.numel() > 1)
    numbers: int = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return round(kept / probe.numel() * numbers)


def _arguments(optimizer: torch.optim.Optimizer) -> set[str]:
    import inspect

    return set(inspect.signature(type(optimizer)).parameters)


_NOT_PER_TOKEN = ("norm", "embed", "lora")
"""Layers whose input is one vector a row, or another layer's."""


def _activation_bytes(policy: Policy) -> int:
    """Inputs of the linear layers for one row: most of what a backward pass keeps, without activation checkpointing."""
    tokens = 1
    config = getattr(getattr(policy, "network", None), "config", None)
    if config is not None and len(policy.latent_shape) == 3:
        patch = getattr(config, "patch_size", 1)
        tokens = policy.latent_shape[1] * policy.latent_shape[2] // (patch * patch if isinstance(patch, int) else 1)
    named = [(name, module) for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    layers = [layer for name, layer in named if not any(word in name for word in _NOT_PER_TOKEN)]
    numbers: int = sum(layer.in_features for layer in layers)
    return tokens * numbers * (layers[0].weight.element_size() if layers else 0)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
