"""Counts the bytes of live tensors: exact, the same on every machine, and blind to what an allocator keeps."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live. What was there before does not count, nor do views of it.

    An operation's own scratch space is not seen, and on an accelerator neither is the backward pass, which runs in another thread.

    Attributes:
        now: bytes that live
        peak: the largest `now` so far
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is not torch.ops.aten.lift_fresh.default:  # torch.tensor(...) makes its storage before anybody is told
            self._see((arguments, keywords), made=False)
        result = function(*arguments, **(keywords or {}))
        self._see(result, made=True)
        return result

    def _see(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes() if made else 0
            if address and address not in self._known:
                self._known.add(address)
                weakref.finalize(storage, self._forget, address, size).atexit = False
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.now -= size
