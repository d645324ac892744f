"""Capacity of a cluster for a run: prompt groups per device, rows that fit the memory, largest number of steps per hour."""

import time
from collections.abc import Iterator

import attrs
import torch
from torch import nn

from ..core import AlignmentLoop, Policy
from ..core.budget import rows_of
from ..core.guided import evaluations
from ..processes.sharding import separate, sharded_bytes
from ..samplers import Branches, Branching
from .activations import Activations, counted_by_size, sizes_of
from .beside import beside_bytes
from .cards import Card
from .kept import Kept
from .limits import limits, work_of
from .rows import innermost
from .sizes import figures, size, state_bytes, tensor_bytes, token_layers, tokens
from .updates import rows_at_once

_GIB = 1024**3


@attrs.frozen
class Cluster:
    """Devices that a run is planned for.

    Args:
        devices: processes, one device each
        memory: memory of a device in GiB; None if it does not matter
        teraflops: speed of a device in TFLOP/s, in the floating type of the policy; None measures this device
        shard: whether weights are sharded over the devices
        card: data sheet of the device; its bound then replaces the estimate from `teraflops`. None if the device is not known
        saved: bytes that weights take less than their type says, because the run will quantise them
    """

    devices: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    memory: float | None = None
    teraflops: float | None = None
    shard: bool = False
    card: Card | None = None
    saved: int = 0


def capacity(loop: AlignmentLoop, cluster: Cluster, activations: Activations | None = None) -> str:
    """Make a table for one cluster. Nothing is run, except a few matrix products if the speed is not given.

    Args:
        loop: the built loop
        cluster: the cluster to plan for
        activations: memory of the run's update; None counts it
    """
    tree = loop.sampler.branching() if isinstance(loop.sampler, Branches) else None
    taken = activations or Activations.of(loop)
    rows = [*_shares(loop, cluster), *_memory(loop, cluster, tree, taken), *_speed(loop, cluster, tree, taken)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _shares(loop: AlignmentLoop, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Rows on how devices share the prompt groups. A group is never split, so some devices wait if the number does not divide."""
    prompts, devices = loop.prompts_per_step, cluster.devices
    if prompts < devices:
        yield (
            "devices",
            (
                f"{devices} devices cannot share {prompts} prompt groups: the samples of a group are compared with each other, so it is "
                f"never split. Give at least {devices} prompts_per_step, or at most {prompts} devices."
            ),
        )
        return
    least, more = divmod(prompts, devices)
    if not more:
        yield "devices", f"{devices} x {least} prompt groups = {prompts} prompts a step; none waits"
        return
    used = prompts / (devices * (least + 1))
    yield (
        "devices",
        (
            f"{more} of {devices} take {least + 1} prompt groups, {devices - more} take {least} and wait: {used:.0%} of the time is "
            f"used. With {least * devices} or {(least + 1) * devices} prompts_per_step none waits."
        ),
    )


def _fixed_bytes(loop: AlignmentLoop, cluster: Cluster) -> int:
    policies = loop.policies()
    tensors = {id(p): p for policy in policies.values() for p in policy.parameters()}
    weights = sum(tensor_bytes(parameter) for parameter in tensors.values())
    if cluster.shard:
        spread = sharded_bytes(policies)
        weights -= spread - spread // cluster.devices
    moving = 0
    apart = {id(policy) for policy in separate(policies)} if cluster.shard else set()
    for role, policy in loop.trained().items():
        gradients = sum(tensor_bytes(p) for p in policy.trainable_parameters().values())
        parts = cluster.devices if apart.intersection(id(module) for module in policy.modules()) else 1
        moving += (gradients + state_bytes(loop.running[role])) // parts
    return weights + moving


def _memory(loop: AlignmentLoop, cluster: Cluster, tree: Branching | None, activations: Activations) -> Iterator[tuple[str, str]]:
    largest = activations.size
    fixed, beside = _fixed_bytes(loop, cluster) - cluster.saved, beside_bytes(loop.objective.policy)
    groups = -(-loop.prompts_per_step // cluster.devices)
    update = None if tree is None else rows_at_once(loop, tree)
    replayed = (update or 0) * groups
    rows = min(rows_of(loop.objective) or replayed, replayed)
    graphs = Kept(0, 0, 1) if tree is None else Kept.of(loop, tree, update)
    held = graphs.rows * groups
    passes = graphs.bytes(activations, rows, groups)
    taken = f"{size(passes)} for {rows} rows{activations.each} in the update"
    if held:
        taken = f"{size(passes)} for {held} rows{activations.each} whose graph the rollout keeps, and the update"
    if not update or not activations.known:
        taken = f"the update comes on top, its {'memory is' if update else 'rows are'} not known"
    at = f", at {largest[0]} x {largest[1]} (height x width), the largest size of a prompt" if largest is not None else ""
    latent = torch.Size(loop.objective.behavior().sized(largest).latent_shape).numel()
    forest = 2 * 4 * latent * groups * sum(tree.widths) if tree is not None else 0
    where = "sharded" if cluster.shard else "whole in each"
    resident = "" if beside.offloaded or not beside.total else f", {size(beside.total)} for text encoders and autoencoder"
    fixed += 0 if beside.offloaded else beside.total
    yield (
        "memory of a device",
        (
            f"about {size(fixed + forest + passes)}: {size(fixed - (0 if beside.offloaded else beside.total))} for weights ({where}), "
            f"gradients and optimizer of the policies{resident}, {size(forest)} for the rollout, {taken}{at}"
        ),
    )
    if beside.total and beside.offloaded:
        too_much = cluster.memory is not None and fixed + beside.texts > cluster.memory * _GIB
        yield (
            "offloaded",
            (
                f"{size(beside.total)} for text encoders and autoencoder, on the CPU; while texts are encoded up to {size(beside.texts)} "
                f"come on top of the weights, and no update then{f'; that does not fit {cluster.memory:g} GiB' if too_much else ''}"
            ),
        )
    if cluster.memory is not None and activations.known and replayed:
        yield "row budget", _row_budget(cluster, cluster.memory, activations, graphs, fixed + forest, held, replayed)


def _row_budget(cluster: Cluster, memory: float, activations: Activations, graphs: Kept, taken: int, held: int, replayed: int) -> str:
    """Say which row budget fits.

    Args:
        cluster: the cluster to plan for
        memory: memory of a device in GiB
        activations: bytes by rows
        graphs: rows whose graph the rollout keeps
        taken: bytes that are taken before the update
        held: rows of a device whose graph the rollout keeps
        replayed: rows of an update on a device
    """
    room, each = memory * _GIB - taken, activations.each
    fits = activations.fitting(room)
    if held > fits:
        return (
            f"nothing fits: the rollout keeps the graph of {held} rows{each}, whatever the budget, and {fits} fit {memory:g} GiB. "
            "Set --sampler.keep_graph false, or draw fewer --prompts_per_step."
        )
    if not graphs.evaluated:
        return f"all {held} rows{each} whose graph the rollout keeps fit {memory:g} GiB ({fits} would); the update evaluates none"
    if held and not graphs.spares:
        taken += activations.at(held)
        fits = activations.fitting(room - activations.at(held))
    if fits < 1:
        return (
            f"nothing fits: {size(taken)} of {memory:g} GiB are taken before the first row of the update, which needs "
            f"{size(activations.at(1))} more. {'Use more devices' if cluster.shard else 'Shard the weights (--shard)'}, a smaller "
            "rank, activation checkpointing, offload or quantization."
        )
    if fits < replayed:
        return f"--objective.rows {fits} fits {memory:g} GiB; an update has {replayed} rows{each}, in {-(-replayed // fits)} pieces"
    return f"all {replayed} rows{each} of an update fit {memory:g} GiB at once ({fits} would)"


def _speed(loop: AlignmentLoop, cluster: Cluster, tree: Branching | None, activations: Activations) -> Iterator[tuple[str, str]]:
    if tree is None:
        return
    policy, update = loop.objective.policy, rows_at_once(loop, tree)
    if update is None:
        yield "steps per hour", f"not known: {type(loop.objective).__name__} does not say how many rows an update has"
        return
    if cluster.card is not None:
        if activations.counted is None:
            yield f"expected on {cluster.card.name}", f"not known, because its operators cannot be counted: {activations.reason}"
            return
        counted = counted_by_size(loop, policy, activations)
        yield from limits(loop, tree, update, cluster.card, list(counted.values()), cluster.devices)
        return
    if cluster.teraflops is None and policy.device.type == "meta":
        yield "steps per hour", "not known: give the card, by --device NAME, or by --teraflops and --bandwidth"
        return
    forward, backward = _operations(loop, activations)
    if not forward:
        yield "steps per hour", f"not known, because its operators cannot be counted: {activations.reason}"
        return
    work = work_of(loop, tree, update, cluster.devices)
    flops = forward * sum(work.rollout + work.update + work.beside) + backward * sum(work.update + work.kept)
    speed = cluster.teraflops or measured_teraflops(policy.device, policy.precision)
    source = "given" if cluster.teraflops else "measured here on matrix products"
    yield (
        "steps per hour",
        (
            f"{'about' if activations.counted is None else 'at most'} {3600 * speed * 1e12 / flops:,.0f}: {figures(flops / 1e12)} TFLOP a "
            f"step and device (rollout, update; no decoding, no rewards) at {speed:.3g} TFLOP/s ({source}); memory is slower than that: "
            "--device NAME looks at both"
        ),
    )


def _operations(loop: AlignmentLoop, activations: Activations) -> tuple[float, float]:
    """Operations of a network row, forward and backward: the mean over the prompts; an estimate if they cannot be counted."""
    policy = loop.objective.policy
    if activations.counted is not None:
        counted = counted_by_size(loop, policy, activations).values()
        rows = [(share, calls(1)) for share, calls in counted]
        return sum(share * row.forward.useful for share, row in rows), sum(share * row.backward.useful for share, row in rows)
    forward = sum(share * row_flops(innermost(policy.sized(asked))) for asked, share in sizes_of(loop).items())
    whole = all(parameter.requires_grad for parameter in policy.parameters())
    return forward, forward * (2 if whole else 1)  # frozen weights need only the gradient of their inputs


def row_flops(policy: Policy) -> float:
    """Estimate the operations of a row, forward: 2 x weights x tokens of the linear layers, and 4 x tokens^2 x width for each attention.

    Layers of the text are left out, and a row under guidance counts twice. This is for transformers whose operators cannot be counted
    (`Counted`); other networks give 0.
    """
    layers, count = token_layers(policy), tokens(policy)
    linear = sum(2.0 * layer.in_features * layer.out_features * count for layer in layers)
    named = [module for module in policy.modules() if isinstance(getattr(module, "to_q", None), nn.Module)]
    widths = [int(getattr(module, "inner_dim", 0)) for module in named]
    return evaluations(policy) * (linear + sum(4.0 * count * count * width for width in widths))


def measured_teraflops(device: torch.device, dtype: torch.dtype, side: int = 1024, repeats: int = 4) -> float:
    """Measure the speed of square matrix products, in TFLOP/s.

    Args:
        device, dtype: device and type of the matrices
        side: number of rows and columns of a matrix
        repeats: number of timed products; one more runs before them
    """
    one = torch.ones(side, side, device=device, dtype=dtype)

    def multiply(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            product = one @ one
        float(product[0, 0])  # waits for the device
        return time.perf_counter() - start

    multiply(1)
    return 2 * side**3 * repeats / multiply(repeats) / 1e12
