"""Time that adapters cost on a device: forward, and forward with backward, of SD3.5-M's and FLUX.1-dev's shapes beside their bound.

Random weights in bfloat16, nothing is downloaded. Ways of computing adapters: none (a fork without a delta), bfloat16 (what diffalign does:
masters in float32, products in bfloat16), float32 (as peft does). For each the median of `repeats` calls in ms, the least that a card of
that kind needs (`cost roofline`), the share of its peak, and memory. Of bfloat16 also: how far velocity and gradients are from
those of float32, and whether a pass with gradients gives the bits of one without, as a replay of a rollout must. Without a GPU: tiny
shapes, whose times say nothing.

Args:
    shapes: models; none takes sd3 and flux with a GPU, their tiny forms without
    rows: rows of a call; none takes 1 to 27 with a GPU, 1 and 2 without
    most: largest number of rows of a backward pass
    repeats: calls that are timed
    device: device; none takes a GPU if there is one
    card: card whose bound is given
    json: also write the rows here
"""

import json as text_of
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.subjects.random_families import FLUX_DEV, SD35_MEDIUM, TINY_FLUX, TINY_SD35, Shape, condition_of, policy_of
from diffalign.core import Condition
from diffalign.costs.cards import CARDS, card
from diffalign.costs.rows import Counted
from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.lora import ADAPTER

SHAPES = {"sd3": SD35_MEDIUM, "flux": FLUX_DEV, "tiny-sd3": TINY_SD35, "tiny-flux": TINY_FLUX}
WAYS = ("none", "bfloat16", "float32")


def set_way(policy: FlowMatchingPolicy, way: str) -> None:
    from diffalign.policies.lora_products import multiply_in_type_of_base

    multiply_in_type_of_base(policy.network, ADAPTER)
    if way == "float32":
        for module in policy.network.modules():
            if hasattr(module, "lora_variant"):
                module.lora_variant.pop(ADAPTER, None)
                module.cast_input_dtype_enabled = True


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    taken = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[2:])


def error(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def probe(shape: Shape, counts: tuple[int, ...], most: int, repeats: int, device: str, kind: str) -> list[dict[str, object]]:
    policy = policy_of(shape, torch.bfloat16, device)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=2e-2)
    reference, text = policy.fork(pristine=True), condition_of(shape, policy)
    weights, found = list(policy.trainable_parameters().values()), []
    for rows in counts:
        noise = torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(2)).to(policy.device)
        sigma = torch.linspace(0.9, 0.3, rows, device=policy.device)
        condition: Condition = text.select(torch.zeros(rows, dtype=torch.long))
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for way in WAYS:
            acting = reference if way == "none" else policy
            if way != "none":
                set_way(policy, way)

            def forward(
                acting: FlowMatchingPolicy = acting, noise: Tensor = noise, sigma: Tensor = sigma, c: Condition = condition
            ) -> Tensor:
                return acting.velocity(noise, sigma, c)

            def both(forward: Callable[[], Tensor] = forward) -> list[Tensor]:
                return list(torch.autograd.grad(forward().float().square().mean(), weights))

            with torch.no_grad():
                bare = forward()
                row: dict[str, object] = {"shape": shape.name, "rows": rows, "adapters": way}
                row["forward_ms"] = milliseconds(forward, policy.device, repeats)
            bound, chip = Counted.of(acting, text)(rows), card(kind)
            row["forward_bound_ms"] = 1e3 * bound.forward.seconds(chip)
            row["forward_share"] = bound.forward.useful / (row["forward_ms"] / 1e3) / chip.half
            row["both_bound_ms"] = 1e3 * (bound.forward.seconds(chip) + bound.backward.seconds(chip))
            if way != "none" and rows <= most:
                if policy.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(policy.device)
                row["both_ms"] = milliseconds(both, policy.device, repeats)
                row["peak_gib"] = torch.cuda.max_memory_allocated(policy.device) / 2**30 if policy.device.type == "cuda" else None
                row["same_bits_with_gradient"] = bool(torch.equal(forward().detach(), bare))
                kept[way] = bare, torch.cat([gradient.flatten() for gradient in both()])
            found.append(row)
            print(text_of.dumps(row), flush=True)
        if len(kept) == 2:
            errors = [error(one, other) for one, other in zip(kept["bfloat16"], kept["float32"], strict=True)]
            found.append({"shape": shape.name, "rows": rows, "velocity_error": errors[0], "gradient_error": errors[1]})
            print(text_of.dumps(found[-1]), flush=True)
    return found


def main(
    shapes: tuple[Literal[*SHAPES], ...] = (),
    rows: tuple[int, ...] = (),
    most: int = 6,
    repeats: int = 5,
    device: str | None = None,
    card: Literal[*CARDS] = "h100",
    json: Path | None = None,
) -> None:
    gpu = torch.cuda.is_available()
    chosen = shapes or (("sd3", "flux") if gpu else ("tiny-sd3", "tiny-flux"))
    counts = rows or ((1, 2, 6, 9, 27) if gpu else (1, 2))
    place = device or ("cuda" if gpu else "cpu")
    found = [row for name in chosen for row in probe(SHAPES[name], counts, most, repeats, place, card)]
    if json:
        write(json, {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__, "rows": found})
