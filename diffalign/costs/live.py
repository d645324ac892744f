"""Bytes of tensors that live at once, counted on torch's meta device too."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and still live, on the meta device too.

    It is exact and the same on every machine. What was there before does not count, nor do views of it. The scratch space of a kernel is
    not seen, nor what an allocator keeps, nor, on an accelerator, the backward pass, which runs in another thread.

    Attributes:
        now: bytes that live
        peak: largest `now` so far
        moments: `now` after each storage that was made
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.moments: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # torch.tensor(...) makes its storage before anybody is told
            self._see((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, made=True)
        return result

    def _see(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if (place := storage._cdata) not in self._known:
                size = storage.nbytes() if made else 0
                self._known.add(place)
                weakref.finalize(storage, self._forget, place, size).atexit = False
                self.now += size
                self.peak = max(self.peak, self.now)
                if made:
                    self.moments.append(self.now)

    def _forget(self, place: int, size: int) -> None:
        self._known.remove(place)
        self.now -= size
