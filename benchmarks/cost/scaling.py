"""Bytes that a step moves and the arithmetic it does, by counting on networks without weights. Prints the tables of docs/scaling.md.

Networks are built on torch's meta device: their shapes are those of the published models, nothing is downloaded, and torch's own counter
counts the floating point operations of a forward pass.

Args:
    teraflops: what a device really reaches, a second
    link: GB/s between two machines
    inside: GB/s between devices of one machine
"""

import attrs
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.subjects.random_families import FLUX_DEV, SD35_MEDIUM, Shape, condition_of, policy_of

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
RANK = 32
ROLLOUT, REPLAY = 42, 13
"""Rows of a prompt group: a 3x3x3 tree in 6 steps, split at steps 2, 3 and 4."""


@attrs.frozen
class Counted:
    """One network.

    Args:
        name: of the model
        weights: numbers
        adapter: numbers of LoRA of rank 32 on the attention
        flops: of one forward row at 512 x 512
    """

    name: str
    weights: int
    adapter: int
    flops: float


def count(shape: Shape) -> Counted:
    with torch.device("meta"):
        network = shape.network()
    layers = [module for name, module in network.named_modules() if isinstance(module, nn.Linear) and name.endswith(TARGETS)]
    adapter = sum(RANK * (module.in_features + module.out_features) for module in layers)
    policy = policy_of(shape, torch.float32, "meta")
    policy.network.disable_adapters()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = torch.zeros(1, *policy.latent_shape, device="meta")
        policy.velocity(latents, torch.zeros(1, device="meta"), condition_of(shape, policy))
    return Counted(shape.name.removesuffix("-dev"), sum(p.numel() for p in network.parameters()), adapter, counter.get_total_flops())


def gradient_bytes(model: Counted, full: bool) -> int:
    """Of one role and phase: gradients are float32, whatever the base is."""
    return 4 * (model.weights if full else model.adapter)


def ring(size: int, processes: int) -> float:
    """What an all-reduce sends from each process: 2 (N - 1) / N times its bytes."""
    return 2 * (processes - 1) / processes * size


def step_flops(model: Counted, full: bool) -> float:
    """Of one prompt group: rollout, replay, the reference's replay, and a backward of one or two forwards."""
    return model.flops * (ROLLOUT + REPLAY * (1 + 1 + (2 if full else 1)))


def gathered_bytes(model: Counted, processes: int, calls: int, full: bool) -> float:
    """What a process receives where the weights are sharded (a base in bfloat16, trained ones in float32): a call gathers what it lacks."""
    return calls * (4 if full else 2) * model.weights * (processes - 1) / processes


def main(teraflops: float = 400.0, link: float = 50.0, inside: float = 400.0) -> None:
    models = [count(shape) for shape in (SD35_MEDIUM, FLUX_DEV)]
    print("| model | weights | LoRA r 32 | TFLOP a row | TFLOP a group, LoRA | full |\n|---|---|---|---|---|---|")
    for m in models:
        lora, full = (step_flops(m, way) / 1e12 for way in (False, True))
        print(f"| {m.name} | {m.weights / 1e9:.2f} G | {m.adapter / 1e6:.1f} M | {m.flops / 1e12:.2f} | {lora:.0f} | {full:.0f} |")
    print("\n| model, role | all-reduce, bytes | N = 2 | 8 | 64 | time at 64 | compute of a group | share |")
    print("|---|---|---|---|---|---|---|---|")
    for m in models:
        for full in (False, True):
            size = gradient_bytes(m, full)
            sent = [ring(size, n) for n in (2, 8, 64)]
            seconds, compute = sent[2] / link / 1e9, step_flops(m, full) / teraflops / 1e12
            kind = "full" if full else "LoRA"
            cells = " | ".join(f"{value / 1e6:,.0f} MB" for value in sent)
            share = seconds / compute
            print(f"| {m.name} {kind} | {size / 1e6:,.0f} MB | {cells} | {seconds:.3f} s | {compute:.2f} s | {share:.1%} |")
    print("\n| model, sharded over 8 | gathered a call | a step | inside a machine | between machines | rows to hide |")
    print("|---|---|---|---|---|---|")
    for m, full in [(m, full) for m in models for full in (False, True)]:
        calls = 6 + 3 + full  # a rollout of 6 steps, replay forward and backward, the reference's replay; gradients are scattered
        one, step = gathered_bytes(m, 8, 1, full), gathered_bytes(m, 8, calls, full)
        hide = [one / speed / 1e9 / (m.flops / teraflops / 1e12) for speed in (inside, link)]
        seconds = [step / speed / 1e9 for speed in (inside, link)]
        rows = f"{hide[0]:.1f} / {hide[1]:.1f}"
        kind = "full" if full else "LoRA"
        print(f"| {m.name} {kind} | {one / 1e9:.1f} GB | {step / 1e9:.0f} GB | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {rows} |")
