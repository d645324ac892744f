"""Operators of a network call, with their operations and bytes, counted without running them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .cards import Card

PRODUCT, ATTENTION, CAST, ELEMENTWISE = "product", "attention", "cast", "elementwise"
"""Kinds of operators. Everything that is no product, attention or cast counts as elementwise, normalisations and copies too."""

_FREE = {"_unsafe_view", "lift_fresh", "alias"}
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products that torch's counter knows under another name."""

_PICKS = {"index", "embedding", "index_select", "gather"}
"""Operators that read no more of their first argument than they write."""


@attrs.frozen
class Operator:
    """One operator of a call.

    Args:
        name: torch's name
        kind: one of the four kinds
        dtype: type of the factors of a product, else of the result
        operations: floating point operations that it does; 0 if it is no product
        useful: operations that the mathematics needs. A fused attention does more: its backward pass computes the scores again. Operators
            of activation checkpointing, which computes in the backward pass what the forward pass did not keep, have none
        moved: bytes of its arguments and results, each counted once
    """

    name: str
    kind: str
    dtype: torch.dtype
    operations: float
    useful: float
    moved: int

    def seconds(self, card: Card, *, fused: bool = False) -> float:
        """Lower bound of the time in seconds: max(operations / peak, bytes / bandwidth).

        Args:
            card: card on which it runs
            fused: whether casts and elementwise operators move no bytes, because a neighbour does their work while it reads or writes
        """
        bytes_moved = 0 if fused and self.kind in (CAST, ELEMENTWISE) else self.moved
        return max(self.operations / card.peak(self.dtype), bytes_moved / card.bandwidth)


@attrs.frozen
class Call:
    """Operators of a network call, in their order.

    Args:
        operators: operators in the order in which they run
    """

    operators: tuple[Operator, ...]

    def seconds(self, card: Card, *, fused: bool = False) -> float:
        """Lower bound of the time in seconds, one operator after the other."""
        return sum(operator.seconds(card, fused=fused) for operator in self.operators)

    @property
    def useful(self) -> float:
        """Operations that the mathematics needs."""
        return sum(operator.useful for operator in self.operators)

    @property
    def moved(self) -> int:
        """Bytes that are moved if no operator is fused with another."""
        return sum(operator.moved for operator in self.operators)

    def of(self, kind: str, dtype: torch.dtype | None = None) -> "Call":
        """Select the operators of a kind, and of a type if one is given."""
        return Call(tuple(some for some in self.operators if some.kind == kind and dtype in (None, some.dtype)))

    def alike(self, other: "Call") -> bool:
        """Compare the names of the operators of two calls, whatever their sizes."""
        return [operator.name for operator in self.operators] == [operator.name for operator in other.operators]

    def at(self, rows: int, other: "Call", first: int) -> "Call":
        """Extrapolate to another number of rows: every number of an operator is a + b * rows.

        Args:
            rows: rows of the call to compute
            other: call of the same operators with first + 1 rows
            first: rows of this call
        """
        further = rows - first
        return Call(
            tuple(
                attrs.evolve(
                    one,
                    operations=one.operations + further * (two.operations - one.operations),
                    useful=one.useful + further * (two.useful - one.useful),
                    moved=one.moved + further * (two.moved - one.moved),
                )
                for one, two in zip(self.operators, other.operators, strict=True)
            )
        )


@contextmanager
def counting() -> Iterator[Callable[[], Call]]:
    """Count the operators of the block. The function that it yields returns the operators since its last call.

    Attention (scaled_dot_product_attention) counts as one operator that keeps no scores, like the kernels of accelerators, on every device.
    Its result is memory without values, so use this only where nobody needs the values.
    """
    mode = _Operators()
    with _FusedAttention(), mode:
        yield mode.taken


def differentiate(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Do the backward pass from an output to inputs inside `counting`, for its operators alone.

    Each gradient is freed once it is there, as where a loop adds it to the one of an earlier call: their sum is not of this pass.
    torch.autograd.backward would suspend the function mode meanwhile, and attention that is computed again would count as another operator.

    Args:
        output: result of a call
        inputs: weights that are trained; they have no gradient before and none after
    """
    hooks = [tensor.register_post_accumulate_grad_hook(_forget_gradient) for tensor in inputs]
    try:
        torch.autograd.graph._engine_run_backward(
            (output,), (torch.empty_like(output),), False, False, tuple(inputs), True, accumulate_grad=True
        )
    finally:
        for hook in hooks:
            hook.remove()


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: list[Operator] = []

    def taken(self) -> Call:
        found, self._found = self._found, []
        return Call(tuple(found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            found = _operator(func, name, args, kwargs, result)
            self._found.append(attrs.evolve(found, useful=0.0) if _again(name) else found)
        return result


def _again(name: str) -> bool:
    """True if activation checkpointing computes an operator of the forward pass again: in a backward pass, but with gradients.

    Our own attention never sees that there are gradients, but its backward pass has another name.
    """
    return torch._C._current_graph_task_id() != -1 and (torch.is_grad_enabled() or name == "attention")


def _operator(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Operator:
    if func.namespace == "diffalign":
        return _attention(name, args)
    read, written = _tensors([*args, *kwargs.values()]), _tensors([result])
    dtype = written[0].dtype if written else torch.float32
    wrote = sum(map(_bytes, written))
    if name in _PICKS:
        return Operator(name, ELEMENTWISE, dtype, 0.0, 0.0, 2 * wrote)
    moved = wrote + sum({id(tensor): _bytes(tensor) for tensor in read}.values())
    plain = _IN_PLACE.get(func.overloadpacket, func.overloadpacket)
    if plain in flop_registry:
        operations = float(flop_registry[plain](*args, **kwargs, out_val=result))
        return Operator(name, PRODUCT, read[-1].dtype, operations, operations, moved)
    casts = name == "_to_copy" and bool(read) and read[0].dtype != dtype
    return Operator("cast" if casts else name, CAST if casts else ELEMENTWISE, dtype, 0.0, 0.0, moved)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _bytes(tensor: Tensor) -> int:
    """Bytes of the numbers that are in memory: an expanded axis counts as one number."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(sizes) * tensor.element_size()


def _attention(name: str, args: Any) -> Operator:
    query, key, value = args[:3]
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    useful = 2.0 * pairs * (query.shape[-1] + value.shape[-1])
    small = _bytes(query) + _bytes(key) + _bytes(value)
    out = math.prod(query.shape[:-1]) * value.shape[-1] * query.element_size()
    if name == "attention":
        return Operator(name, ATTENTION, query.dtype, useful, useful, small + out)
    return Operator(name, ATTENTION, query.dtype, 2.5 * useful, 2.0 * useful, 2 * small + 2 * out)


@torch.library.custom_op("diffalign::attention", mutates_args=())
def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("diffalign::attention_backward", mutates_args=())
def _fused_backward(query: Tensor, key: Tensor, value: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_fused.register_fake(lambda query, key, value: query.new_empty(*query.shape[:-1], value.shape[-1]))
_fused_backward.register_fake(lambda query, key, value, given: (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)))
_fused.register_autograd(
    lambda ctx, given: _fused_backward(*ctx.saved_tensors, given),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return _fused(query, key, value)
        return func(*args, **kwargs)
