"""Network calls that are collectives: every process makes the same calls in the same order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ..core import Condition, Devices, Policy, Prompt
from ..core.errors import BrokenCallError, PeerFailed

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_FAILED, _FINISHED, _BACKWARD, _NOTHING = -1, 0, 1 << 20, -(1 << 20)


@attrs.define(eq=False)
class AnnouncedCalls:
    """`Lockstep` for sharded weights: a network call gathers weights from all processes, so all of them must make it.

    Before a call, each process announces which policy it is about to evaluate, with or without a graph. All processes then make the
    announced call with the smallest code. A process that announced another call, or none, makes it with one row of weight zero. So the
    processes may have different numbers of prompts and chunks.

    Args:
        devices: the processes
        policies: policies that evaluate a network of their own
        padded: number of calls that this process has made for others
    """

    devices: Devices
    policies: tuple[Policy, ...]
    padded: int = attrs.field(default=0, init=False)
    _conditions: dict[int, Condition] = attrs.field(factory=dict, init=False)
    _called: "dict[int, FSDPModule]" = attrs.field(factory=dict, init=False)
    _graphs: list[Tensor] = attrs.field(factory=list, init=False)
    _left: bool = attrs.field(default=False, init=False)
    _padding: bool = attrs.field(default=False, init=False)

    @classmethod
    def over(cls, policies: Mapping[str, Policy], devices: Devices, modules: "Sequence[FSDPModule]") -> "AnnouncedCalls":
        """Follow the network calls of all policies. For a wrapper, these are the calls of the policy inside.

        Args:
            policies: policies of the run, by role
            devices: the processes
            modules: the sharded modules, only the outermost ones
        """
        lockstep = cls(devices, innermost(policies))
        for sharded in modules:
            module: Any = sharded
            module.register_forward_pre_hook(lambda called, _: lockstep._called.update({id(called): called}))
        for index, policy in enumerate(lockstep.policies):
            readable = policy.examples or (Prompt(""),)
            lockstep._conditions[index] = policy.encode(readable[:1])
            lockstep._listen(index, policy)
        return lockstep

    def backward(self, loss: Tensor) -> None:
        """Back-propagate together with the other processes, including the calls that were made for others."""
        self._take_turn(_BACKWARD)
        with self._collective("the backward pass"):
            torch.autograd.backward(loss + self._zero())

    def finish(self, failed: bool) -> None:
        """Take part in the calls of the others until all have finished or one has failed."""
        while not self._left:
            codes = self._tell(_FAILED if failed else _FINISHED)
            if failed or min(codes) == _FAILED or max(codes) == _FINISHED:
                break
            self._serve(min(code for code in codes if code > _FINISHED))
        self._left = False
        self._graphs.clear()
        self._tidy()

    def _listen(self, index: int, policy: Policy) -> None:
        """Announce the calls of a policy. Its class is replaced, as `fully_shard` does it, so that views of the policy announce too."""
        kind = type(policy)

        def velocity(called: Policy, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            if self._padding:
                return kind.velocity(called, latents, sigma, condition)
            graph = torch.is_grad_enabled()
            self._take_turn(1 + 4 * index + 2 * graph + (graph and latents.requires_grad))
            with self._collective(f"a call of {len(latents)} rows"):
                return kind.velocity(called, latents, sigma, condition)

        policy.__class__ = type(kind.__name__, (kind,), {"velocity": velocity, "__module__": kind.__module__, "__doc__": kind.__doc__})

    def _take_turn(self, mine: int) -> None:
        """Wait until all processes make the call that this process is about to make."""
        while True:
            codes = self._tell(mine)
            if min(codes) == _FAILED:
                self._left = True
                raise PeerFailed
            chosen = min(code for code in codes if code > _FINISHED)
            if chosen == mine:
                return
            self._serve(chosen)

    def _tell(self, mine: int) -> list[int]:
        codes = torch.full((self.devices.size,), _NOTHING)
        codes[self.devices.rank] = mine
        return [int(code) for code in self.devices.maximum(codes)]

    def _serve(self, code: int) -> None:
        """Take part in a call of another process, with one row whose result has weight zero."""
        self.padded += 1
        with self._collective("a call made for another process"):
            if code == _BACKWARD:
                zero = self._zero()
                if zero.requires_grad:
                    torch.autograd.backward(zero)
            else:
                self._pad(code)

    def _pad(self, code: int) -> None:
        index, rest = divmod(code - 1, 4)
        policy = self.policies[index]
        self._padding = True
        try:
            with torch.set_grad_enabled(rest >= 2):
                latents = policy.prior(torch.zeros(1, *policy.latent_shape)).requires_grad_(rest == 3)
                sigma = policy.sigmas(2)[1:2].to(latents.device)
                result = policy.velocity(latents, sigma, self._conditions[index])
            if result.requires_grad:
                self._graphs.append(result)
        finally:
            self._padding = False

    def _tidy(self) -> None:
        """Reset the sharded modules after a failed call, or a graph without backward pass, so that each process holds its own part."""
        for module in self._called.values():
            module.reset_iter_state()
        self._called.clear()

    def _zero(self) -> Tensor:
        """Zero, with the graphs of the calls that were made for others since the last backward pass."""
        graphs, self._graphs = self._graphs, []
        return torch.stack([0.0 * graph.sum().float() for graph in graphs]).sum() if graphs else torch.zeros(())

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        """Turn an error into `BrokenCallError`: in this block the others wait for this process, so they cannot be told."""
        try:
            yield
        except Exception as error:
            self._tidy()
            here = f"process {self.devices.rank} of {self.devices.size}"
            if isinstance(error, torch.OutOfMemoryError):
                raise BrokenCallError(
                    f"{here} ran out of memory in {what}: {error}\nThe weights are sharded, so the others wait in the same call and the "
                    "step cannot be repeated; the run ends. Continue by --resume with smaller --sampler.rows (rollout) and "
                    "--objective.rows (update), activation checkpointing, or more processes."
                ) from error
            raise BrokenCallError(
                f"{here} failed in {what}, which all processes make together because the weights are sharded: {error}\nEither this process "
                "has failed, or another one has ended: look for its message, and continue by --resume."
            ) from error


def innermost(policies: Mapping[str, Policy]) -> tuple[Policy, ...]:
    """Policies that evaluate a network of their own, each once. A wrapper is replaced by the policy inside."""
    inner: dict[int, Policy] = {}
    for policy in policies.values():
        for module in policy.modules():
            if isinstance(module, Policy) and not any(isinstance(below, Policy) for below in list(module.modules())[1:]):
                inner[id(module)] = module
    return tuple(inner.values())
