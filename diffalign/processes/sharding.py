"""Weights that are sharded over the processes of a run, by torch's fully_shard."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from ..core import Devices, HostWeights, Lockstep, Policy
from .devices import TorchDevices
from .lockstep import AnnouncedCalls, innermost

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@attrs.frozen
class FullySharded:
    """Sharding by `fully_shard`: each of N processes keeps 1/N of the weights, and all are gathered while a call lasts.

    Two kinds of weights are sharded:

    - Every frozen module that policies share (the base of LoRA forks). Forks share submodules, not only tensors, so a module that is
      sharded once serves all of them. Adapters stay whole in every process.
    - The network of a policy that shares nothing (full fine-tuning, and its reference, average and other forks), block by block.
      Each backward pass sums and shards the gradients, and an optimizer keeps only the state of its part.

    Shard after the last fork, because deepcopy of a sharded module raises. A policy that is loaded with this object as `sharding` leaves
    its network on the host. Then one module after the other goes to the device, which keeps only this process's part of it.

    Args:
        least: modules with fewer numbers stay whole, because a collective for each would cost more time than it saves memory

    Attributes:
        host: the weights that wait on the host
    """

    least: int = attrs.field(default=65536, validator=attrs.validators.ge(1))
    host: HostWeights = attrs.field(factory=HostWeights, init=False, eq=False, repr=False)

    def shard(self, policies: Mapping[str, Policy], devices: Devices) -> Lockstep:
        """Shard the weights in place.

        Args:
            policies: all policies that share the weights
            devices: the processes, of which there must be several

        Raises:
            ValueError: there is only one process, weights are quantised, or there is nothing to shard.
        """
        if any(not parameter.is_floating_point() for policy in policies.values() for parameter in policy.parameters()):
            raise ValueError(
                "sharding needs weights in a floating type, but some of this run are quantised: their scales would not be sharded with "
                "them. Leave out policy.quantization or sharding."
            )
        if not isinstance(devices, TorchDevices):
            raise ValueError("sharding needs several processes; this is one. Start the run by torchrun or accelerate launch.")
        shared = [module for module in shared_modules(policies) if _numbers(module) >= self.least]
        networks = [network for policy in separate(policies) if _numbers(policy) >= self.least for network in _networks(policy)]
        if not shared and not networks:
            raise ValueError(
                f"sharding needs a module of at least {self.least} numbers that is frozen and shared, or that belongs to one policy only; "
                f"{', '.join(policies)} have none. Leave sharding out."
            )
        mesh = devices.mesh()
        modules = [self._spread(module, mesh, devices.device) for module in shared]
        for network in networks:
            for block in blocks(network):
                if _numbers(block) >= self.least:
                    self._spread(block, mesh, devices.device)
            modules.append(self._spread(network, mesh, devices.device))
        self._place_the_rest(policies, devices.device)
        inner = {id(below) for module in [*shared, *networks] for below in list(module.modules())[1:]}
        return AnnouncedCalls.over(policies, devices, [module for module in modules if id(module) not in inner])

    def _spread(self, module: nn.Module, mesh: "DeviceMesh", device: torch.device) -> "FSDPModule":
        from torch.distributed.fsdp import fully_shard

        self.host.place(module, device, copy=False)  # fully_shard copies its part
        spread: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        spread.set_gradient_divide_factor(1.0)  # losses are means over all processes already
        spread.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend has
        return spread

    @torch.no_grad()
    def _place_the_rest(self, policies: Mapping[str, Policy], device: torch.device) -> None:
        """Move the tensors that stay whole (small modules, adapters, buffers) to the device, in place, because forks share them."""
        for policy in policies.values():
            self.host.place(policy, device, copy=True)
            for module in policy.modules():
                for parameter in module.parameters(recurse=False):
                    if parameter.device.type != device.type:
                        parameter.data = parameter.data.to(device)
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device.type != device.type:
                        module._buffers[name] = buffer.to(device)
        self.host.require_none()


def shared_modules(policies: Mapping[str, Policy]) -> Iterator[nn.Module]:
    """Largest frozen modules that all policies share as one object, each once, inner modules first."""
    places: dict[int, int] = {}
    for policy in innermost(policies):
        for module in policy.modules():
            places[id(module)] = places.get(id(module), 0) + 1
    moving = {id(p) for policy in policies.values() for p in policy.own_parameters().values()}
    seen: set[int] = set()
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if id(module) in seen or not parameters:
            return
        seen.add(id(module))
        frozen = not any(parameter.requires_grad for parameter in parameters)
        shared = places.get(id(module), 0) > 1 or not any(id(parameter) in moving for parameter in parameters)
        if frozen and shared and not any(isinstance(inner, _CONTAINERS) for inner in module.modules()) and not isinstance(module, Policy):
            found.append(module)
        else:
            for child in module.children():
                walk(child)

    for policy in policies.values():
        walk(policy)
    yield from sorted(found, key=lambda module: len(list(module.modules())))


def separate(policies: Mapping[str, Policy]) -> Iterator[Policy]:
    """Policies that own all their weights and share none. Their optimizers then see only sharded tensors, never both kinds."""
    inner = innermost(policies)
    owners: dict[int, int] = {}
    for policy in inner:
        for parameter in policy.parameters():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for policy in inner:
        own = {id(parameter) for parameter in policy.own_parameters().values()}
        apart = all(id(parameter) in own and owners[id(parameter)] == 1 for parameter in policy.parameters())
        if apart and not list(policy.parameters(recurse=False)):
            yield policy


def _networks(policy: Policy) -> list[nn.Module]:
    return [child for child in policy.children() if list(child.parameters())]


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Entries of the outermost module lists; each is gathered and freed as a whole. Empty if weights are tied across modules."""
    if len(list(network.named_parameters(remove_duplicate=False))) == len(list(network.parameters())):
        yield from _entries(network)


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            if list(child.parameters()):
                yield child
        else:
            yield from _entries(child)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sharded_bytes(policies: Mapping[str, Policy]) -> int:
    """Bytes of the weights that sharding would spread."""
    modules = [*shared_modules(policies), *separate(policies)]
    tensors: dict[int, torch.Tensor] = {id(p): p for module in modules for p in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
