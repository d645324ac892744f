"""A recorder of the CPU that does what a CUDA graph does: it runs the operators of a call again, on the same tensors, and no Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.policies.cuda_recorder import Recorder


class Operators(TorchDispatchMode):
    """Keeps every operator with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.done.append((operator, args, kwargs or {}, result))
        return result


class Tape(Recorder):
    """Args: share of the host and memory held that `timed` reports; kinds of calls (gradient or not) that cannot be recorded, and how."""

    def __init__(self, share=1.0, held=0.0, refuses=(), error=RuntimeError):
        self.share, self.held, self.refuses, self.error = share, held, refuses, error
        self.recorded = self.replayed = self.pools = 0

    def works_on(self, device):
        return device.type == "cpu"

    def timed(self, work):
        return work(), self.share, self.held

    def warm(self, work):
        work()

    def record(self, work, pool):
        if torch.is_grad_enabled() in self.refuses:
            raise self.error("operation not permitted when stream is capturing\nmore")
        self.recorded += 1
        with Operators() as operators:
            result = work()

        @torch.no_grad()
        def replay():
            self.replayed += 1
            for operator, args, kwargs, kept in operators.done:
                again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(kept), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

        return result, replay

    def pool(self):
        self.pools += 1
        return self.pools
