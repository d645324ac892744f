"""Network calls that wait for the host: recorded once for each shape, and replayed."""

import copy
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffalign.core.spread import is_spread
from diffalign.core.unessential import say_once

from .cuda_recorder import CudaRecorder, Recorder

Compute = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(latents [B, *], sigma [B], tensors of the condition) -> velocity [B, *]."""


class _OneAtATime:
    """Lock for filling, replaying and reading a recording: recordings share memory, and other threads may call networks too."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None

    def __enter__(self) -> None:
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self.owner = None
        self.lock.release()

    @property
    def mine(self) -> bool:
        """True within a call of this thread that is being recorded or timed."""
        return self.owner == threading.get_ident()


_TURN = _OneAtATime()


@attrs.frozen
class CallGraphs:
    """Records network calls that wait for the host as CUDA graphs, and replays them.

    A GPU does the kernels of a small call faster than the host starts them: one row of SD3.5-M takes 59 ms, its kernels take 16 ms; a call
    of the embedded pipeline takes 18 ms, its kernels 3 to 5 ms (one H100). A graph starts all of them at once, and computes the same bits.

    When a shape comes for the second time, the call is timed. If the host was at work for more than `bound` of it, the call is recorded,
    and from then on replayed.

    Recorded are the calls on the current CUDA device. Where weights are spread over processes, under a caller's autocast and in inference
    mode nothing is. A network that waits for the device within a call cannot be recorded: it runs as it is from there on, and a line says
    why. A recording reads weights, and no Python. Weights that are written are seen; where they were replaced, moved, or are trained from
    now on, calls are recorded anew. Adapters of the network that you switch or scale by hand are not seen.

    Args:
        bound: share of the host in the time of a call from which on it is recorded
        most: recordings of a policy at most
        gradients: record calls with gradient too, forward and backward. They keep the memory of their activations, so only small ones are.
            While the backward pass of a recording is still to come, further calls of its shape run as they are. This has not run on a GPU
            yet: `python -m benchmarks break gpu --only graphs` compares it with calls as they are
        held: share of the device's memory that the activations of the recorded calls of a policy may hold

    Reference: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    bound: float = attrs.field(default=0.8, validator=[attrs.validators.gt(0), attrs.validators.le(1)])
    most: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    gradients: bool = False
    held: float = attrs.field(default=0.02, validator=[attrs.validators.ge(0), attrs.validators.le(1)])

    def of(self, network: nn.Module) -> "RecordedCalls":
        """Make what records the calls of a network."""
        return RecordedCalls(network, self, CudaRecorder())


@attrs.define(eq=False)
class RecordedCalls:
    """Calls of one network that are replayed where they were recorded.

    Args:
        network: the network whose weights the calls read
        settings: choice of what is recorded
        recorder: records on the device
    """

    network: nn.Module
    settings: CallGraphs
    recorder: Recorder
    _known: dict["_Key", "_Call | None"] = attrs.field(factory=dict, init=False)
    _seen: set["_Key"] = attrs.field(factory=set, init=False)
    _pool: object = attrs.field(default=None, init=False)
    _refused: set[bool] = attrs.field(factory=set, init=False)
    _held: float = attrs.field(default=0.0, init=False)

    def __call__(self, compute: Compute, state: Hashable, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the velocity, by a recording where there is one.

        Args:
            compute: the call as it is
            state: all beside inputs and weights that the call depends on
            latents, sigma, tensors: its inputs
        """
        names, inputs = tuple(tensors), (latents, sigma, *tensors.values())
        gradient = torch.is_grad_enabled()
        if not self._may_record(gradient, inputs):
            return compute(latents, sigma, tensors)
        key = _Key(state, gradient, names, tuple((tensor.shape, tensor.dtype) for tensor in inputs))

        def work(given: Sequence[Tensor]) -> Tensor:
            return compute(given[0], given[1], dict(zip(names, given[2:], strict=True)))

        with _TURN:
            if key not in self._known:
                return self._first(key, work, inputs)
            call = self._known[key]
            if call is not None and not call.weights.stand():
                self._forget_what_moved()
                call = None
            if call is not None and not call.waits():
                return call(inputs)
        return work(inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecordedCalls":
        """Record the copied network's calls anew: a recording reads the weights of this one."""
        return RecordedCalls(copy.deepcopy(self.network, memo), self.settings, copy.deepcopy(self.recorder, memo))

    def count(self, gradient: bool) -> int:
        """Count the recordings of calls with or without gradient."""
        return sum(call is not None for key, call in self._known.items() if key.gradient == gradient)

    def _may_record(self, gradient: bool, inputs: Sequence[Tensor]) -> bool:
        if gradient in self._refused or (gradient and not self.settings.gradients) or _TURN.mine or torch.is_inference_mode_enabled():
            return False
        if torch.is_autocast_enabled(inputs[0].device.type):  # the caller's keeps casts of weights beyond a call
            return False
        return all(self.recorder.works_on(tensor.device) and not tensor.requires_grad for tensor in inputs)

    def _first(self, key: "_Key", work: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Compute a call that was not decided on; the second time decides."""
        if key not in self._seen:
            self._seen.add(key)
            return work(inputs)
        if self.count(gradient=False) + self.count(gradient=True) >= self.settings.most:
            oldest = next(call for call in self._known.values() if call is not None)
            if oldest.weights.stand():
                return work(inputs)  # undecided: a place may become free
            self._forget_what_moved()
        result, share, held = self.recorder.timed(lambda: work(inputs))
        held = held if key.gradient else 0.0  # without gradient only the result is held
        self._known[key] = None
        if share >= self.settings.bound and self._held + held <= self.settings.held:
            self._record(key, work, inputs, held)
        return result

    def _forget_what_moved(self) -> None:
        """Give back the places and the memory of recordings whose weights are no longer where they were."""
        moved = {key: call for key, call in self._known.items() if call is not None and not call.weights.stand()}
        for key, call in moved.items():
            self._held -= call.held
            del self._known[key]

    def _record(self, key: "_Key", work: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], held: float) -> None:
        weights = _Weights(self.network)
        if weights.spread():
            self._refused = {False, True}
            return
        if self._pool is None:
            self._pool = self.recorder.pool()
        try:
            if key.gradient and weights.trained():
                self._known[key] = _WithGradient(self.recorder, work, inputs, weights, held, self.network)
            else:
                self._known[key] = _Plain(self.recorder, work, inputs, weights, held, self._pool)
        except torch.OutOfMemoryError:  # this one runs as it is
            return
        except RuntimeError as error:
            self._refused.add(key.gradient)
            self._known = {other: call for other, call in self._known.items() if other.gradient != key.gradient}
            lines = str(error).strip().splitlines() or [""]
            calls = f"calls of {type(self.network).__name__} {'with' if key.gradient else 'without'} gradient"
            say_once(f"call graphs: {calls} cannot be recorded and run as they are ({type(error).__name__}: {lines[0][:300]})")
            return
        self._held += held


class _Key(NamedTuple):
    """Mark of a recording: all beside weights on which the kernels of a call depend."""

    state: Hashable
    gradient: bool
    names: tuple[str, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]


class _Weights:
    """Weights of a network where a recording reads them."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = [(module._modules, name, child) for module in network.modules() for name, child in module._modules.items()]
        self.tensors = [
            (held, name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for module in network.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def stand(self) -> bool:
        """True if all are where they were, and the same are trained."""
        return all(held.get(name) is child for held, name, child in self.modules) and all(
            held.get(name) is tensor and tensor.data_ptr() == place and tensor.requires_grad == trained
            for held, name, tensor, place, trained in self.tensors
        )

    def spread(self) -> bool:
        """True if processes share them."""
        return any(is_spread(tensor) for _, _, tensor, _, _ in self.tensors)

    def trained(self) -> bool:
        """True if one carries a gradient."""
        return any(trained for *_, trained in self.tensors)


class _Call(ABC):
    """A recorded call: inputs in a fixed place, weights where they were."""

    def __init__(self, inputs: Sequence[Tensor], weights: _Weights, held: float) -> None:
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        self.weights = weights
        self.held = held

    def waits(self) -> bool:
        """True if the recording's memory is still needed."""
        return False

    def fill(self, inputs: Sequence[Tensor]) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)

    @abstractmethod
    def __call__(self, inputs: Sequence[Tensor]) -> Tensor: ...


class _Plain(_Call):
    """A recorded call without gradient."""

    def __init__(
        self, recorder: Recorder, work: Callable[..., Tensor], inputs: Sequence[Tensor], weights: _Weights, held: float, pool: object
    ):
        super().__init__(inputs, weights, held)
        recorder.warm(lambda: work(self.inputs))
        self.output, self.replay = recorder.record(lambda: work(self.inputs), pool)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        self.fill(inputs)
        self.replay()
        return self.output.clone()  # type: ignore[no-any-return]


class _WithGradient(_Call):
    """A recorded call whose backward pass is recorded, too. Between the two its memory must not be written."""

    def __init__(
        self, recorder: Recorder, work: Callable[..., Tensor], inputs: Sequence[Tensor], weights: _Weights, held: float, network: nn.Module
    ):
        super().__init__(inputs, weights, held)
        self.turn: weakref.ref[_Turn] | None = None
        live: Tensor | None = None

        def forward() -> Tensor:
            nonlocal live
            with stand_ins:
                live = work(self.inputs)
            return live

        def backward() -> list[Tensor | None]:
            nonlocal live
            assert live is not None
            found = torch.autograd.grad(live, stand_ins.parameters, self.gradient, allow_unused=True)
            live = None
            return list(found)

        stand_ins = _StandIns(network)
        self.trained = stand_ins.trained
        self.gradient = torch.empty(0)
        apart = recorder.pool()  # other recordings would write over the activations
        recorder.warm(lambda: self._both(forward, backward))
        self.output, self.replay = recorder.record(forward, apart)
        self.output = self.output.detach()
        self.found, self.go_back = recorder.record(backward, apart)

    def _both(self, forward: Callable[[], Tensor], backward: Callable[[], object]) -> None:
        self.gradient = torch.zeros_like(forward().detach())
        backward()

    def waits(self) -> bool:
        return self.turn is not None and self.turn() is not None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        result: Tensor = _Replayed.apply(self, inputs, *self.trained)  # type: ignore[no-untyped-call]
        return result


class _StandIns:
    """New parameters in the place of the trained ones, on the same memory.

    Autograd remembers the stream of a parameter as long as a graph of it is alive; while a recording runs, it would wait for that stream.
    """

    def __init__(self, network: nn.Module) -> None:
        held: dict[nn.Parameter, nn.Parameter] = {}  # tied weights have several places
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.requires_grad:
                    new = held.setdefault(parameter, nn.Parameter(parameter.detach()))
                    self.places.append((module, name, parameter, new))
        self.trained, self.parameters = list(held), list(held.values())

    def __enter__(self) -> None:
        for module, name, _, new in self.places:
            module._parameters[name] = new

    def __exit__(self, *error: object) -> None:
        for module, name, parameter, _ in self.places:
            module._parameters[name] = parameter


class _Turn:
    """Time from a forward pass to its backward pass; it is gone when autograd forgets the call."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _WithGradient, inputs: Sequence[Tensor], *trained: Tensor) -> Tensor:
        ctx.call, ctx.turn = call, _Turn()
        call.turn = weakref.ref(ctx.turn)
        call.fill(inputs)
        call.replay()
        velocity: Tensor = call.output.clone()
        return velocity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: _WithGradient = ctx.call
        if call.turn is None or call.turn() is not ctx.turn:
            raise RuntimeError(
                "the backward pass of a recorded call runs once. Compute the call again, or leave `graphs` out of the policy."
            )
        # no lock: its memory is its own until the turn is over, and a thread that records may need the one that runs this
        call.gradient.copy_(gradient)
        call.go_back()
        found = (None, None, *(None if found is None else found.clone() for found in call.found))
        call.turn = None
        return found
