"""What adapters cost on a device: forward, and forward with backward, of SD3.5-M's and FLUX.1-dev's shapes beside their bound.

python benchmarks/adapter_probe.py [--shapes sd3 flux] [--rows 1 9 27] [--device cuda] [--card h100] [--json FILE]

Random weights in bfloat16, nothing is downloaded. Ways of computing adapters: none (a fork without a delta), bfloat16 (what diffalign does:
masters in float32, products in bfloat16), float32 (as peft does). For each the median of --repeats calls in ms, the least that a card of
that kind needs (benchmarks/roofline.py), the share of its peak, and memory. Of bfloat16 also: how far velocity and gradients are from
those of float32, and whether a pass with gradients gives the bits of one without, as a replay of a rollout must. Without a GPU: tiny
shapes, whose times say nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_families import FLUX_DEV, SD35_MEDIUM, TINY_FLUX, TINY_SD35, Shape, condition_of, policy_of
from torch import Tensor

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


def probe(shape: Shape, options: argparse.Namespace) -> list[dict[str, object]]:
    policy = policy_of(shape, torch.bfloat16, options.device)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=2e-2)
    reference, text = policy.fork(pristine=True), condition_of(shape, policy)
    weights, found = list(policy.trainable_parameters().values()), []
    for rows in options.rows:
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
                row["forward_ms"] = milliseconds(forward, policy.device, options.repeats)
            if options.card is not None:
                bound = Counted.of(acting, text)(rows)
                chip = card(options.card)
                row["forward_bound_ms"] = 1e3 * bound.forward.seconds(chip)
                row["forward_share"] = bound.forward.useful / (row["forward_ms"] / 1e3) / chip.half
                row["both_bound_ms"] = 1e3 * (bound.forward.seconds(chip) + bound.backward.seconds(chip))
            if way != "none" and rows <= options.most:
                if policy.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(policy.device)
                row["both_ms"] = milliseconds(both, policy.device, options.repeats)
                row["peak_gib"] = torch.cuda.max_memory_allocated(policy.device) / 2**30 if policy.device.type == "cuda" else None
                row["same_bits_with_gradient"] = bool(torch.equal(forward().detach(), bare))
                kept[way] = bare, torch.cat([gradient.flatten() for gradient in both()])
            found.append(row)
            print(json.dumps(row), flush=True)
        if len(kept) == 2:
            errors = [error(one, other) for one, other in zip(kept["bfloat16"], kept["float32"], strict=True)]
            found.append({"shape": shape.name, "rows": rows, "velocity_error": errors[0], "gradient_error": errors[1]})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["sd3", "flux"] if gpu else ["tiny-sd3", "tiny-flux"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 6, 9, 27] if gpu else [1, 2])
    parser.add_argument("--most", type=int, default=6, help="rows of a backward pass at most (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--card", choices=list(CARDS), default="h100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for name in options.shapes for row in probe(SHAPES[name], options)]
    if options.json:
        name = torch.cuda.get_device_name() if gpu else "CPU"
        options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
