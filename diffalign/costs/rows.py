"""Operators of a call of a policy's network, by its rows, counted on torch's meta device."""

import copy
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch import Tensor, nn

from ..core import Condition, Policy
from ..core.forking import view_of
from ..core.spread import is_spread
from ..core.wrapper import PolicyAround
from ..policies import FlowMatchingPolicy
from .live import LiveBytes
from .mixed import MixedPrecision
from .operators import Call, counting, differentiate

_COUNTED = 3
"""Rows up to which calls are counted one by one. One row has fewer operators than two: nothing needs to be copied for it."""

_MANY = 32
"""Rows of the further call that shows the memory of a network that treats rows one by one."""


@attrs.frozen
class Line:
    """Bytes at one moment of a call, by its rows: fixed + per_row * rows.

    Args:
        fixed: bytes whatever the rows
        per_row: bytes for each row
    """

    fixed: int
    per_row: int

    @classmethod
    def through(cls, rows: int, count: int, more: int, larger: int) -> "Line":
        """Draw the line through two counts; the bytes of a row are rounded up.

        Args:
            rows, count: rows of a call and its bytes
            more, larger: the same of a call of more rows
        """
        per_row = -((count - larger) // (more - rows))
        return cls(count - rows * per_row, per_row)

    def at(self, rows: int) -> int:
        """Bytes of a call of that many rows."""
        return self.fixed + self.per_row * rows


@attrs.frozen
class Pass:
    """Operators of a network call, forward and backward.

    Args:
        rows: rows of the call
        forward: operators of the forward pass with gradients, which keeps activations
        backward: operators of the backward pass to the trained weights; empty if nothing is trained
        peak: bytes that live at once beside the weights and their gradients, at most
        moments: bytes that live beside them after each storage that was made
    """

    rows: int
    forward: Call
    backward: Call
    peak: int
    moments: tuple[int, ...] = attrs.field(default=(), repr=False)


@attrs.define(eq=False)
class Counted:
    """Counts the operators of a policy's calls by their rows. Each number of rows is counted once.

    A pipeline in mixed precision (`compute`) is counted as a GPU computes it, on whatever device it is; `MixedPrecision` says what is
    approximated.

    Args:
        policy: innermost policy, with its network on the meta device
        condition: condition of one row, on the meta device
        compute: type in which float32 weights are multiplied; None for their own
    """

    policy: Policy
    condition: Condition
    compute: torch.dtype | None = None
    _known: dict[int, Pass] = attrs.field(factory=dict, init=False)
    _lines: tuple[Line, ...] = attrs.field(default=(), init=False, repr=False)

    @classmethod
    def of(cls, policy: Policy, condition: Condition) -> "Counted":
        """Make a counter from a policy, which is not changed: parameters are copied as tensors without memory.

        Args:
            policy: any policy; wrappers around it call the same network
            condition: condition whose first row stands for all rows

        Raises:
            ValueError: weights are quantised or sharded over processes; they are not the factors that are multiplied.
        """
        inner = innermost(policy)
        if any(is_spread(parameter) or not parameter.is_floating_point() for parameter in inner.parameters()):
            raise ValueError("counting needs whole weights in a floating type; some are quantised, or sharded over processes")
        first = condition.select(torch.zeros(1, dtype=torch.long))
        tensors = {name: tensor if name == "lengths" else tensor.to("meta") for name, tensor in first.tensors.items()}
        compute = inner.compute if isinstance(inner, FlowMatchingPolicy) else None
        return cls(_on_meta(inner), attrs.evolve(first, tensors=tensors), compute)

    def __call__(self, rows: int) -> Pass:
        """Count a call of that many rows. Calls of more than three follow from two and three, unless the network treats rows one by one."""
        if rows not in self._known:
            self._known[rows] = self.run(rows) if rows <= _COUNTED else self._continued(rows)
        return self._known[rows]

    def _continued(self, rows: int) -> Pass:
        two, three = self(_COUNTED - 1), self(_COUNTED)
        if not self._alike():
            return self.run(rows)
        forward, backward = two.forward.at(rows, three.forward, _COUNTED - 1), two.backward.at(rows, three.backward, _COUNTED - 1)
        return Pass(rows, forward, backward, self.peak(rows))

    def _alike(self) -> bool:
        two, three = self(_COUNTED - 1), self(_COUNTED)
        alike = two.forward.alike(three.forward) and two.backward.alike(three.backward)
        return alike and len(two.moments) == len(three.moments)

    def peak(self, rows: int) -> int:
        """Bytes that live at once beside the weights and their gradients in a forward and a backward pass: the largest of `lines`.

        One row is counted, because it has fewer operators.

        Activation checkpointing shows in it. Attention keeps no scores, as with the kernels of accelerators. The scratch space of
        kernels and what an allocator keeps are not seen.
        """
        return self(rows).peak if rows < _COUNTED - 1 else max(line.at(rows) for line in self.lines())

    def lines(self) -> tuple[Line, ...]:
        """Bytes by rows at each moment of a call, from the calls of two and three rows.

        At few rows the moment with most bytes may be another than at many: one in which few bytes are of the rows and many of a weight's
        size. A network that treats rows one by one has other moments at other rows; its lines lead through the peaks of some calls.
        """
        if not self._lines:
            two, three = self(_COUNTED - 1), self(_COUNTED)
            pairs = set(zip(two.moments, three.moments, strict=True)) if self._alike() else {(two.peak, three.peak)}
            lines = {Line.through(_COUNTED - 1, less, _COUNTED, more) for less, more in pairs}
            if not self._alike():
                lines.add(Line.through(_COUNTED, three.peak, _MANY, self(_MANY).peak))
            self._lines = tuple(lines)
        return self._lines

    def run(self, rows: int) -> Pass:
        """Do a forward and a backward pass of that many rows on the meta device, and count their operators and their bytes."""
        condition = self.condition.select(torch.zeros(rows, dtype=torch.long))
        latents = torch.zeros(rows, *self.policy.latent_shape, device="meta")
        with LiveBytes() as live, counting() as taken, torch.enable_grad():
            with self._mixed(keeps=True):
                velocity = self.policy.velocity(latents, torch.full((rows,), 0.5, device="meta"), condition)
            forward = taken()
            if velocity.requires_grad:
                with self._mixed(keeps=False):
                    differentiate(velocity, list(self.policy.trainable_parameters().values()))
            return Pass(rows, forward, taken(), live.peak, tuple(live.moments))

    def _mixed(self, *, keeps: bool) -> AbstractContextManager[object]:
        return nullcontext() if self.compute is None else MixedPrecision(self.compute, keeps=keeps)


def innermost(policy: Policy) -> Policy:
    """Policy that has the network, inside all wrappers."""
    while isinstance(policy, PolicyAround):
        policy = policy.policy
    return policy


def _on_meta(policy: Policy) -> Policy:
    """View of a policy whose modules have parameters and buffers without memory. Everything that is no module is shared."""
    twin = view_of(policy)
    twin._modules = {name: None if module is None else _meta_copy(module) for name, module in policy._modules.items()}
    twin._parameters = {name: None if value is None else _meta(value) for name, value in policy._parameters.items()}
    twin._buffers = {name: None if value is None else value.to("meta") for name, value in policy._buffers.items()}
    twin.counter = copy.copy(policy.counter)
    return twin


def _meta_copy(module: nn.Module) -> nn.Module:
    memo: dict[int, object] = {id(parameter): _meta(parameter) for parameter in module.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def _meta(value: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
