"""What tests/test_sharding_host.py runs in each process: `torchrun tests/host_processes.py FOLDER PIPELINE`.

A denoiser that waits on the host until it is spread, beside one that is loaded whole.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from diffalign.core import AlignmentLoop, Average, HostWeights, Prompt
from diffalign.core.spread import whole
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.processes.devices import connect, disconnect
from diffalign.processes.sharding import FullySharded
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

RUNS = {"lora": LoRA(rank=2), "full": None}


class Moves:
    """Numbers of a network that are moved at once: by `Module.to`, or by `HostWeights.place`."""

    def __init__(self):
        self.largest = 0

    def count(self, parameters):
        self.largest = max(self.largest, sum(parameter.numel() for parameter in parameters))

    def __enter__(self):
        self._apply, self._place = nn.Module._apply, HostWeights.place
        counter, apply, place = self, self._apply, self._place

        def applied(module, fn, recurse=True):
            if "Transformer" in type(module).__name__:
                counter.count(module.parameters())
            return apply(module, fn, recurse)

        def placed(host, module, device, *, copy):
            counter.count(parameter for parameter in module.parameters() if id(parameter) in host._held)
            return place(host, module, device, copy=copy)

        nn.Module._apply, HostWeights.place = applied, placed
        return self

    def __exit__(self, *_):
        nn.Module._apply, HostWeights.place = self._apply, self._place


def trained(pipeline, lora, waits, devices):
    """A step, and how the weights came to their places."""
    torch.manual_seed(0)
    sharding = FullySharded(least=64)
    with Moves() as moves:
        policy = FlowMatchingPolicy.from_pretrained(pipeline, lora=lora, device="cpu", sharding=sharding if waits else None)
        size = sum(parameter.numel() for parameter in policy.parameters())
        before = next(policy.network.parameters()).dtype
        objective = SoftmaxTB(policy)
        shared = all(
            one.data_ptr() == two.data_ptr() for one, two in zip(policy.parameters(), objective.reference.parameters(), strict=True)
        )
        sampler = TreeSampler(3, FixedPlan(splits=(1,), branches=2))
        optimizers = {"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
        loop = AlignmentLoop(
            objective,
            sampler,
            channel_reward,
            Prompts(["a", "b"]),
            prompts_per_step=2,
            optimizers=optimizers,
            average=Average(0.5),
            devices=devices,
            sharding=sharding,
        )
    stepped = {id(parameter) for group in loop.running["policy"].param_groups for parameter in group["params"]}
    assert stepped == {id(parameter) for parameter in policy.trainable_parameters().values()}  # those that are there after the spread
    loop.run(1)
    weights = {f"{role}.{n}": whole(p).clone() for role, each in loop.policies().items() for n, p in each.named_parameters()}
    spread = sum(parameter.numel() for parameter in policy.parameters() if isinstance(parameter, DTensor))
    return {"weights": weights, "moved": moves.largest / size, "spread": spread / size, "before": before, "shared": shared}


def first_of_each(images, prompts):
    """1 for the first picture of a prompt, else 0: in scores of these pictures little but their rounding would differ."""
    return torch.tensor([float(prompt not in prompts[:place]) for place, prompt in enumerate(prompts)])


def multiplied_in_half(pipeline, sharding, devices):
    """Two steps of adapters whose masters are float32 and whose products are in the type of the base."""
    torch.manual_seed(0)
    policy = FlowMatchingPolicy.from_pretrained(
        pipeline, lora=LoRA(rank=2), max_sequence_length=24, resolution=32, device="cpu", dtype="bfloat16"
    )
    layers = [module for module in policy.network.modules() if hasattr(module, "lora_variant")]
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    loop = AlignmentLoop(
        SoftmaxTB(policy),
        TreeSampler(3, FixedPlan(splits=(1,), branches=2)),
        first_of_each,
        Prompts(["a", "b"]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.SGD(parameters, lr=1e-3)},
        max_grad_norm=1.0,
        devices=devices,
        sharding=sharding,
    )
    before = {name: parameter.detach().clone() for name, parameter in policy.network.named_parameters() if "lora_" in name}
    loop.run(2)
    trained = policy.trainable_parameters()
    base = [parameter for parameter in policy.parameters() if not parameter.requires_grad and parameter.numel() >= 64]
    return {
        "before": before,
        "after": {name: whole(parameter).clone() for name, parameter in policy.network.named_parameters() if name in before},
        "trained": {parameter.dtype for parameter in trained.values()},
        "base": {parameter.dtype for parameter in base},
        "spread": sum(isinstance(parameter, DTensor) for parameter in base) / len(base),
        "in the type of the base": all(layer.lora_variant for layer in layers) and len(layers) == len(trained) // 2,
    }


def gathered(pipeline, lora, checkpointing, devices):
    """Numbers, padded, that a forward and a backward pass gather."""
    verb = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # of torch before 2.13
    sharding, counts, inner = FullySharded(least=64), [0], getattr(dist, verb)
    policy = FlowMatchingPolicy.from_pretrained(pipeline, lora=lora, device="cpu", checkpointing=checkpointing, sharding=sharding)
    lockstep = sharding.shard({"policy": policy, "fork": policy.fork()} if lora else {"policy": policy}, devices)

    def counted(output, *arguments, **options):
        counts[-1] += output.numel() // output.element_size() if output.dtype == torch.uint8 else output.numel()
        return inner(output, *arguments, **options)

    setattr(dist, verb, counted)
    try:
        latents, sigma = torch.ones(2, *policy.latent_shape), torch.full((2,), 0.5)
        loss = policy.velocity(latents, sigma, policy.encode([Prompt("a"), Prompt("b")])).square().sum()
        counts.append(0)
        lockstep.backward(loss)
        lockstep.finish(False)
    finally:
        setattr(dist, verb, inner)
    return counts


def threads():
    """Names of this process's threads, Python's and others."""
    return sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())


def main(folder, pipeline):
    torch.set_num_threads(1)
    devices = connect()
    for name, lora in RUNS.items():
        for waits in (False, True):
            torch.save(trained(pipeline, lora, waits, devices), folder / f"{name}-{waits}-{devices.rank}.pt")
    counts = {(name, again): gathered(pipeline, lora, again, devices) for name, lora in RUNS.items() for again in (False, True)}
    torch.save({f"{name}-{again}": count for (name, again), count in counts.items()}, folder / f"gathered-{devices.rank}.pt")
    for name, sharding in (("whole", None), ("spread", FullySharded(least=64))):
        torch.save(multiplied_in_half(pipeline, sharding, devices), folder / f"half-{name}-{devices.rank}.pt")
    disconnect(devices)
    (folder / f"threads-{devices.rank}").write_text("\n".join(threads()) if os.path.isdir("/proc/self/task") else "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
