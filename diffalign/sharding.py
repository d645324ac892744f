"""Frozen weights spread over the processes of a run, by torch's native fully_shard."""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import nn

from .core import Devices, Lockstep, Policy
from .devices import TorchDevices
from .lockstep import Announced

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@attrs.frozen
class FullySharded:
    """Each process keeps 1/N of every frozen module that policies share, and gathers it for the length of a call.

    Forks share submodules, not only tensors, so a module that is sharded once serves all of them; what is trained stays whole in every
    process. It has to be done after the last fork: deepcopy of a sharded module raises.

    Args:
        least: modules with fewer numbers stay whole, because a collective for each would cost more than they weigh
    """

    least: int = attrs.field(default=65536, validator=attrs.validators.ge(1))

    def shard(self, policies: Mapping[str, Policy], devices: Devices) -> Lockstep:
        """Shard in place.

        Args:
            policies: all that share the weights
            devices: the processes, of which there must be several

        Raises:
            ValueError: one process, or nothing that is frozen and shared.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if not isinstance(devices, TorchDevices):
            raise ValueError("sharding needs several processes; this is one. Start the run by torchrun or accelerate launch.")
        modules = [module for module in _shareable(policies) if _numbers(module) >= self.least]
        if not modules:
            raise ValueError(
                f"sharding finds no frozen module of at least {self.least} numbers in {', '.join(policies)}. Train LoRA instead of all "
                "weights, or leave sharding out."
            )
        mesh = init_device_mesh(devices.device.type, (devices.size,))
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return Announced.over(policies, devices)


def _shareable(policies: Mapping[str, Policy]) -> Iterator[nn.Module]:
    """The largest frozen modules that are one object to all policies, each once, inner ones first."""
    places: dict[int, set[str]] = {}
    for role, policy in policies.items():
        for module in policy.modules():
            places.setdefault(id(module), set()).add(role)
    moving = {id(p) for policy in policies.values() for p in policy.own_parameters().values()}
    seen: set[int] = set()
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if id(module) in seen or not parameters:
            return
        seen.add(id(module))
        frozen = not any(parameter.requires_grad for parameter in parameters)
        shared = len(places[id(module)]) > 1 or not any(id(parameter) in moving for parameter in parameters)
        if frozen and shared and not any(isinstance(inner, _CONTAINERS) for inner in module.modules()) and not isinstance(module, Policy):
            found.append(module)
        else:
            for child in module.children():
                walk(child)

    for policy in policies.values():
        walk(policy)
    yield from sorted(found, key=lambda module: len(list(module.modules())))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sharded_bytes(policies: Mapping[str, Policy]) -> int:
    """Bytes of the frozen modules that sharding would spread."""
    tensors: dict[int, torch.Tensor] = {id(p): p for module in _shareable(policies) for p in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
