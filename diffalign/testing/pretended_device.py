"""Pretended accelerator on the CPU: tensors on `far:0` refuse to mix with CPU tensors, as those of a GPU do.

    with second_device() as traffic:
        policy = FlowMatchingPolicy.from_pretrained("shapeworld", device="far")
        AlignmentLoop(...).run(2)
    print(traffic.bytes_up, traffic.bytes_down, traffic.synchronizations)

torch's Python backend for the PrivateUse1 key names the device. A wrapper subclass holds a CPU tensor, runs every operator on it, and
raises where CUDA would: operands on two devices (CPU tensors without dimensions are allowed, as there), a CPU tensor indexed by a far one.
Autograd, optimizers, `module.to`, forks, threads and checkpoint files work on it.

It has no streams, no kernels or rounding of its own, no autocast, no limit of memory, and no `torch.compile`. Code that checks for the
device type "cuda" by name does not see it, so mixed tensors there are not found.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

DEVICE = "far"
_HERE = (str(Path(torch.__file__).parent), __file__)
_ATEN: Any = torch.ops.aten
_COPIES = {_ATEN.copy_.default, _ATEN._to_copy.default}
_INDEXED = {
    *(_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default),
    *(_ATEN._index_put_impl_.default, _ATEN._unsafe_index.Tensor),
}
_JOINED = {_ATEN.cat.default, _ATEN.stack.default}
"""Operators that refuse even a CPU tensor without dimensions."""
_SIZED_BY_VALUES = {
    *(_ATEN.nonzero.default, _ATEN._unique2.default, _ATEN.unique_dim.default, _ATEN.masked_select.default),
    *(_ATEN.repeat_interleave.Tensor, _ATEN.bincount.default, _ATEN.equal.default),
}
"""Operators for which the host must wait: their result is a number, or its size depends on values."""
_BARE = (_ATEN.copy_.default, _ATEN._to_copy.default, _ATEN._local_scalar_dense.default, _ATEN.detach.default)
"""Operators that `torch.tensor` and `as_tensor` call with subclasses switched off, so that no fallback is used."""
_GROWING = (
    *(_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step, _ATEN.linspace.default, _ATEN.logspace.default),
    *(_ATEN.eye.default, _ATEN.eye.m, _ATEN.randperm.default, _ATEN.tril_indices.default, _ATEN.triu_indices.default),
)
"""Factories that torch builds from an empty tensor which grows; a wrapper tensor cannot grow."""


@attrs.define(eq=False)
class Traffic:
    """Traffic between the host and the pretended device.

    Args:
        bytes_up: bytes from the host to the device
        bytes_down: bytes from the device to the host
        copies: number of copies, in both directions
        waits: place in the code -> number of times that the host waited for the device there: for a number (`.item()`, `bool(tensor)`), the
            size of a result (a mask, `unique`), a copy down, a copy up that is not `non_blocking`, or an index on the CPU
    """

    bytes_up: int = 0
    bytes_down: int = 0
    copies: int = 0
    waits: Counter[str] = attrs.field(factory=Counter)

    @property
    def synchronizations(self) -> int:
        """Number of times that the host waited for the device."""
        return sum(self.waits.values())

    def moved(self, tensor: Tensor, *, up: bool, waits: bool = True) -> None:
        """Count a copy between host and device."""
        size = tensor.numel() * tensor.element_size()
        self.copies += 1
        if up:
            self.bytes_up += size
        else:
            self.bytes_down += size
        if waits:
            self.waited()

    def waited(self) -> None:
        """Count one wait of the host."""
        self.waits[_place()] += 1


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operator, or a tensor of the device was asked for as an array."""


class FarTensor(torch.Tensor):
    """Tensor on `far:0`; `raw` is the CPU tensor inside."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor) -> "FarTensor":
        raw = raw.resolve_conj().resolve_neg()  # a wrapper cannot show that conjugation or negation is still to be done
        far: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=torch.device(DEVICE, 0)
        )
        far.raw = raw
        return far

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FarTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """Tensor without its graph. Assigning to it also replaces the tensor inside."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = _inside(value)

    # torch does not allow these two for subclasses

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise MixedDevicesError(f"{_place()}: a tensor on {DEVICE}:0 has no numpy array; copy it to the CPU first (.cpu())")

    __array__ = numpy  # type: ignore[assignment]


class _Backend:
    """Functions that torch requires of the module of a device."""

    def is_available(self) -> bool:
        return bool(_watching)  # torch keeps the device for the rest of the process, which must not use it outside the context

    def device_count(self) -> int:
        return int(self.is_available())

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    manual_seed = manual_seed_all

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, *_: Any) -> None:
        pass

    def set_device(self, *_: Any) -> None:
        pass


_libraries: list[Any] = []
_watching: list[Traffic] = []


def register() -> None:
    """Register the device with torch for the rest of the process. Outside `second_device` it reports that it is not available.

    Torch counts devices at the first backward pass of a process. If that came before this call, the device has no gradients.

    Raises:
        RuntimeError: this torch is too old for a device written in Python.
    """
    if _libraries:
        return
    import torch.utils.backend_registration as registration

    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        raise RuntimeError(f"the pretended device needs torch 2.10 or newer; this is {torch.__version__}")
    registration._setup_privateuseone_for_python_backend(DEVICE, _Backend())
    factories, inside = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    factories.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # casts nothing
    for func in (*_BARE, *_GROWING):
        inside.impl(func, lambda *args, _func=func, **kwargs: _run(_func, args, kwargs), "PrivateUse1")
    _libraries.extend((factories, inside, autocast))


def has_gradients() -> bool:
    """True if a backward pass on the device works; see `register`."""
    leaf = torch.ones((), device=DEVICE, requires_grad=True)
    try:
        leaf.clone().backward()
    except RuntimeError:
        return False
    return True


@contextmanager
def second_device() -> Iterator[Traffic]:
    """Make `device="far"` available in all threads while the context is open; gives the traffic.

    Raises:
        RuntimeError: this torch is too old.
    """
    register()
    traffic = Traffic()
    _watching.append(traffic)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield traffic
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        _watching.remove(traffic)


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _place() -> str:
    """Name the innermost line of code that is neither in torch nor in this file, and the innermost line of the package."""
    frame: Any = sys._getframe(1)
    first = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_HERE) and "<frozen" not in file:
            name = f"{_short(file)}:{frame.f_lineno} {frame.f_code.co_name}"
            if "diffalign" in file or "site-packages" not in file:
                return name if not first else f"{name} ({first})"
            first = first or name
        frame = frame.f_back
    return first or "?"


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-3:])


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU tensors inside, and refuse what CUDA refuses."""
    tensors = [thing for thing in _leaves([*args, *kwargs.values()]) if isinstance(thing, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    if func is _ATEN._local_scalar_dense.default:
        _each(lambda traffic: traffic.waited())
        return func(args[0].raw)
    near = [tensor for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.device.type == "cpu"]
    if func in _JOINED:
        _refuse_mixed(func, far, near)
    elif func in _INDEXED:
        _refuse_index(func, args, far)
    elif func not in _COPIES:
        _refuse_mixed(func, far, [tensor for tensor in near if tensor.ndim > 0])
    if func in _SIZED_BY_VALUES:
        _each(lambda traffic: traffic.waited())
    if func in _INDEXED and far:
        for index in (leaf for leaf in _leaves(args[1]) if isinstance(leaf, Tensor)):
            if not isinstance(index, FarTensor):
                _each(lambda traffic, index=index: traffic.moved(index, up=True))
            elif index.dtype in (torch.bool, torch.uint8):
                _each(lambda traffic: traffic.waited())
    return _wrapped(func, args, kwargs, far)


def _wrapped(func: Any, args: Sequence[Any], kwargs: dict[str, Any], far: Sequence["FarTensor"]) -> Any:
    device = kwargs.get("device")
    inner = {**kwargs}
    if "device" in inner:
        inner["device"] = None if device is None else torch.device("cpu")
    if "pin_memory" in inner:
        inner["pin_memory"] = None
    result = func(*_mapped(_inside, list(args)), **{name: _mapped(_inside, value) for name, value in inner.items()})
    for tensor in far:
        if tensor.raw.shape != tensor.shape:
            raise RuntimeError(f"{_place()}: {func} changed the size of a tensor in place, which the pretended device cannot")
    if func is _ATEN.copy_.default:
        up = isinstance(args[0], FarTensor)
        if up != isinstance(args[1], FarTensor):
            _each(lambda traffic: traffic.moved(args[1], up=up, waits=not up or not _unhurried(args[2:], kwargs)))
        return args[0]
    came = bool(far)
    goes = _is_far(device) if device is not None else came
    if func is _ATEN._to_copy.default and came != goes:
        _each(lambda traffic: traffic.moved(result, up=goes, waits=not goes or not _unhurried((), kwargs)))
    if not goes:
        return result
    known = {id(tensor.raw): tensor for tensor in far}  # in-place operators must return the tensor that they got

    def outside(thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return thing
        return known[id(thing)] if id(thing) in known else FarTensor(thing)

    return _mapped(outside, result)


def _leaves(thing: Any) -> Iterator[Any]:
    """Yield the values in the arguments or results of an operator: values, lists and tuples (torch's own function for this is too slow)."""
    if isinstance(thing, list | tuple):
        for part in thing:
            yield from _leaves(part)
    else:
        yield thing


def _mapped(function: Any, thing: Any) -> Any:
    if isinstance(thing, list | tuple):
        return type(thing)([_mapped(function, part) for part in thing])
    return function(thing)


def _inside(thing: Any) -> Any:
    return thing.raw if isinstance(thing, FarTensor) else thing


def _unhurried(rest: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """True if a copy is `non_blocking`."""
    return bool(kwargs.get("non_blocking", rest[0] if rest else False))


def _each(count: Any) -> None:
    for traffic in _watching:
        count(traffic)


def _refuse_mixed(func: Any, far: Sequence[Tensor], near: Sequence[Tensor]) -> None:
    if far and near:
        raise MixedDevicesError(
            f"{_place()}: {func} got tensors on {DEVICE}:0, shapes {_shapes(far)}, and on the CPU, shapes {_shapes(near)}; all must be on "
            "one device. Build or move the second on the device of the first."
        )


def _refuse_index(func: Any, args: Sequence[Any], far: Sequence[Tensor]) -> None:
    if not isinstance(args[0], FarTensor):
        raise MixedDevicesError(
            f"{_place()}: {func}: indices should be either on cpu or on the same device as the indexed tensor (cpu); got some on "
            f"{DEVICE}:0, shapes {_shapes(far)}"
        )
    if len(args) > 2 and isinstance(args[2], Tensor):
        _refuse_mixed(func, [args[0]], [args[2]] if not isinstance(args[2], FarTensor) and args[2].ndim > 0 else [])


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
