"""Forward and backward passes of a large model's shape under one attention setting: a program of its own, because a fault ends the process.

Prints one line of JSON: `ok`, the error if there is one, whether gradients are finite, how far they are from those under "math" alone
(--against), the kernels that ran forward and backward, milliseconds and memory. KERNELS are those that torch may choose from, joined by
"+": flash, efficient, cudnn, math.
"""

import json
import time
from collections.abc import Callable
from typing import Literal

import attrs
import torch
from torch import Tensor

from benchmarks.subjects.random_families import FLUX_DEV, SD35_MEDIUM, TINY_FLUX, TINY_SD35, condition_of, policy_of
from diffalign.policies import FlowMatchingPolicy

SHAPES = {"flux": FLUX_DEV, "sd3": SD35_MEDIUM, "tiny-flux": TINY_FLUX, "tiny-sd3": TINY_SD35}
_SWITCHES = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}


@attrs.frozen
class Options:
    """What is tried.

    Args:
        shape: of the model
        kernels: that torch may choose from
        against: kernels that give the gradients to compare with
        lora: type of the adapters
        rows: of the passes
        tokens: of the text; null is as many as the model has
        device: of the model
    """

    shape: Literal[*SHAPES]
    kernels: str
    against: str | None = None
    lora: Literal["float32", "bfloat16"] = "float32"
    rows: int = 2
    tokens: int | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def allow(kernels: str) -> None:
    for name, switch in _SWITCHES.items():
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(name in kernels.split("+"))


def passes(policy: FlowMatchingPolicy, rows: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward pass of some rows; the trained weights."""
    noise = torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    latents = policy.prior(noise.to(policy.device))
    sigma = torch.linspace(0.9, 0.3, rows, device=policy.device)
    condition = policy.probe_condition.select(torch.zeros(rows, dtype=torch.long))
    return lambda: policy.velocity(latents, sigma, condition), list(policy.trainable_parameters().values())


def gradients(forward: Callable[[], Tensor], weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(forward().float().square().mean(), weights))


def attention_of(run: Callable[[], object]) -> list[str]:
    """Names of the attention operators that a call reaches."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    return sorted(name.removeprefix("aten::") for name in names if "attention" in name and name != "_scaled_dot_product_attention_math")


def probe(options: Options) -> dict[str, object]:
    shape = attrs.evolve(SHAPES[options.shape], tokens=options.tokens or SHAPES[options.shape].tokens)
    dtype = torch.float32 if options.shape.startswith("tiny") else torch.bfloat16
    policy = policy_of(shape, dtype, options.device)
    if options.lora != "float32":
        for parameter in policy.trainable_parameters().values():
            parameter.data = parameter.data.to(getattr(torch, options.lora))
    with torch.no_grad():  # a fresh adapter has no gradient in its first matrix
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=1e-2)
    policy.probe_condition = condition_of(shape, policy)
    allow(options.kernels)
    forward, weights = passes(policy, options.rows)
    on_gpu = policy.device.type == "cuda"
    result: dict[str, object] = {"kernels": attention_of(lambda: gradients(forward, weights))}
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        found = gradients(forward, weights)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    result |= {"ms": round(min(times), 1), "finite": all(bool(gradient.isfinite().all()) for gradient in found)}
    if on_gpu:
        result["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if options.against:
        allow(options.against)
        expected = gradients(forward, weights)
        gap = torch.stack([(one.double() - other.double()).norm() for one, other in zip(found, expected, strict=True)]).norm()
        result["gap"] = float(gap / torch.stack([gradient.double().norm() for gradient in expected]).norm())
    return {**result, "ok": result["finite"] and result.get("gap", 0.0) < 0.1}


def main(options: Options) -> None:
    try:
        result = probe(options)
    except RuntimeError as error:  # torch reports a fault of the device so; the process is lost, the line is not
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    about = {"shape": options.shape, "allowed": options.kernels, "lora": options.lora, "rows": options.rows}
    print(json.dumps({**about, **result}), flush=True)
