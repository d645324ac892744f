"""Update: runs the phases of an objective in order. Either all of them take effect or none does."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import attrs
import torch
from torch import Tensor

from .errors import NonFiniteError, UpdateError
from .finite import blame
from .groups import group_std
from .interfaces import Objective, Phase
from .ledger import Ledger
from .loss_scale import scales_of, unscale
from .policy import Policy
from .processes import Devices, Lockstep, together
from .report import Metrics, on_host
from .spread import is_spread, local, whole
from .types import Loss, ScoredBatch
from .undo import Undo
from .unessential import say_once


@attrs.define(eq=False)
class Update:
    """Runs the phases of an objective and steps the optimizers.

    All gradients of a phase are computed and checked on all processes before any of its roles steps. If a later phase fails, weights,
    optimizers and everything that the objective moved after its updates are put back as they were before the first phase.

    Where gradients pass through float16, losses are scaled (`scales_of`): an update whose gradients overflow in some process is repeated in
    all, at a scale 2^4 times smaller; the metric `loss_scale/ROLE` is the scale that was taken. Norms, clipping and optimizers see the
    gradients of the unscaled losses.

    Args:
        objective: objective whose `after_update` is called
        phases: phases of the objective
        running: role -> optimizer
        devices: the processes of the run
        lockstep: keeps their network calls in step
        max_grad_norm: gradients are clipped to it per role; None leaves them
        moving: is called before weights move that nothing moves back
    """

    objective: Objective
    phases: tuple[Phase, ...]
    running: Mapping[str, torch.optim.Optimizer]
    devices: Devices
    lockstep: Lockstep
    max_grad_norm: float | None
    moving: Callable[[], None] = lambda: None
    _taught: set[tuple[str, ...]] = attrs.field(factory=set, init=False)
    """Roles of the phases that have had a gradient."""

    def trained(self) -> dict[str, Policy]:
        """Trained weights by role, over all phases."""
        return {role: policy for phase in self.phases for role, policy in phase.trains.items()}

    def trained_among(self, roles: Mapping[str, Policy]) -> set[str]:
        """Names among `roles` whose network rows are those of trained weights, which the objective may train under another name."""
        counters = {id(policy.counter) for policy in self.trained().values()}
        return {role for role, policy in roles.items() if id(policy.counter) in counters}

    def __call__(self, batch: ScoredBatch, ledger: Ledger, roles: Mapping[str, Policy], metrics: Metrics) -> None:
        """Run all phases on one batch.

        Args:
            batch: the scored batch
            ledger: takes the network rows
            roles: policies whose rows are counted, by role
            metrics: takes the metrics of the losses

        Raises:
            NonFiniteError: a loss, gradient or metric is not finite, in this process or another. Everything is as it was before the call.
            ValueError: the losses of a phase are no `Loss`, none has a graph, or a metric has a name of the loop. Everything is as it was.
            UpdateError: memory ran out where fewer rows would not help, or a loss was yielded inside no_grad or autocast.
        """
        several = sum(phase.repeats * len(phase.trains) for phase in self.phases) > 1
        undo = self._remember() if several else None
        try:
            for phase in self.phases:
                for update in range(phase.repeats):
                    with ledger.stage("update", roles):
                        counted = self._compute_gradients(phase, batch, update, metrics)
                        self._step(phase, batch, metrics, counted, repeatable=undo is not None)
        except BaseException:
            self._forget_gradients()
            if undo is not None:
                undo()
            raise

    def _remember(self) -> Undo:
        """Copy what the update may change.

        Raises:
            UpdateError: memory ran out, in this process or another. Fewer rows at once would not help.
        """
        with together(self.devices, self.lockstep):
            try:
                return Undo.remember(self.objective, self.trained(), self.running)
            except torch.OutOfMemoryError as error:
                raise UpdateError(
                    f"{error}\nMemory ran out while weights and optimizers were copied, so that an update that fails half-way can be taken "
                    "back. Nothing was updated. Train fewer weights (LoRA), keep the weights on more devices (--shard), or draw fewer "
                    "--prompts_per_step."
                ) from error

    def _forget_gradients(self) -> None:
        for optimizer in self.running.values():
            optimizer.zero_grad(set_to_none=True)

    def _compute_gradients(self, phase: Phase, batch: ScoredBatch, update: int, metrics: Metrics) -> tuple[int, int]:
        """Compute the gradients; returns how many losses this process has yielded, and how many of them have a graph."""
        *scales, last = scales_of(phase.trains)
        for scale in scales:
            sums, state = dict(metrics.sums), copy.deepcopy(dict(self.objective.state()))
            counted = self._backward(phase, batch, update, metrics, scale)
            overflowed = any(_bad_gradient(policy) is not None for policy in phase.trains.values())
            if not bool(self.devices.maximum(torch.tensor(float(overflowed)))):
                _note_scale(phase, scale, metrics)
                return counted
            if self.devices.rank == 0:
                say_once(
                    f"role {_names(phase)}: a gradient overflowed in float16, so the update is repeated at a smaller scale of its losses, "
                    "as others may be. Each try costs one more update; the metric loss_scale/ROLE says which scale was taken. bfloat16 "
                    "needs none."
                )
            metrics.sums = sums
            if state:
                self.objective.restore(state)
            if update == 0 and batch.trajectories.mean.requires_grad:  # a graph that the rollout kept is used up: its rows are replayed
                batch.trajectories.mean.detach_()
        counted = self._backward(phase, batch, update, metrics, last)
        if scales:
            _note_scale(phase, last, metrics)
        return counted

    def _backward(self, phase: Phase, batch: ScoredBatch, update: int, metrics: Metrics, scale: float) -> tuple[int, int]:
        """Compute the gradients at one scale of the losses. That they are finite is required at scale 1 only."""
        counted = 0, 0
        for role in phase.trains:
            self.running[role].zero_grad(set_to_none=True)
        with together(self.devices, self.lockstep):
            try:
                counted = self._accumulate(phase, batch, update, metrics, scale)
            except NonFiniteError as error:  # raised by an objective, which does not know role and step
                if str(error).startswith("role "):
                    raise
                raise NonFiniteError(f"role {_names(phase)}, step {batch.progress.step}: {error}") from error
            unscale(phase.trains, scale)
            if scale == 1.0:
                for role, policy in phase.trains.items():
                    _require_finite_gradients(role, policy, phase, batch)
        return counted

    def _step(self, phase: Phase, batch: ScoredBatch, metrics: Metrics, counted: tuple[int, int], repeatable: bool) -> None:
        norms = {role: self._norm(role, policy, batch.progress.step) for role, policy in phase.trains.items()}
        if (roles := tuple(phase.trains)) not in self._taught:
            if any(map(bool, norms.values())):  # equal in all processes, so all of them meet in the other branch or none does
                self._taught.add(roles)
            else:
                self._require_graph(phase, batch, *counted)
        if not repeatable:
            self.moving()
        try:
            with together(self.devices, self.lockstep):
                for role, policy in phase.trains.items():
                    metrics.add(f"grad_norm/{role}", norms[role], 1)
                    if self.max_grad_norm is not None:
                        torch.nn.utils.clip_grads_with_norm_(list(policy.trainable_parameters().values()), self.max_grad_norm, norms[role])
                    self.running[role].step()
                    self.objective.after_update(role)
        except torch.OutOfMemoryError as error:
            if repeatable:
                raise
            raise UpdateError(
                f"{error}\nMemory ran out while the optimizer of {_names(phase)} stepped. Some weights may have moved, so the step is not "
                "repeated. Continue from the last checkpoint by --resume, and use less memory: smaller rows, --shard, or more processes."
            ) from error

    def _require_graph(self, phase: Phase, batch: ScoredBatch, yielded: int, attached: int) -> None:
        """Refuse a phase that cannot learn: it has never had a gradient, and of the losses in all processes none has a graph.

        A role may rest and yield nothing. Where the rewards of every group are equal, a loss may be a plain zero; so it may be in a later
        step, where an objective leaves out all samples.
        """
        spread = bool((group_std(batch.rewards[batch.scored], batch.trajectories.group[batch.scored]) > 0).any())
        losses, graphs, apart = self.devices.sum(torch.tensor([yielded, attached, spread], dtype=torch.float64)).tolist()
        if phase.trains and losses and apart and not graphs:
            raise ValueError(
                f"step {batch.progress.step}: the losses of {_names(phase)} carry no gradient: of {losses:.0f} that {_source(phase)} "
                "yielded, none has a graph. Look for .detach(), .item() or no_grad around what is yielded, and for values of a fork in "
                "place of the trained weights. Nothing was updated."
            )

    def _accumulate(self, phase: Phase, batch: ScoredBatch, update: int, metrics: Metrics, scale: float) -> tuple[int, int]:
        values: list[Tensor] = []
        names: set[str] = set()
        attached = 0
        for loss in yielded(phase, batch, update):
            if not torch.is_grad_enabled() or torch.is_autocast_enabled(loss.value.device.type):
                raise UpdateError(
                    f"the losses of {', '.join(phase.trains)} yielded inside no_grad or autocast, which leaks into the loop's backward; "
                    "leave the block before each yield."
                )
            values.append(loss.value.detach())
            if loss.value.requires_grad:
                attached += 1
                self.lockstep.backward(loss.value * scale)
            metrics.take(loss, _source(phase))
            names.update(loss.metrics)
        _require_finite(values, {name: metrics.sums[name] for name in sorted(names)}, phase, batch)
        return len(values), attached

    def _norm(self, role: str, policy: Policy, step: int) -> Tensor:
        """Norm of the gradients over all processes, equal in each. Gradients of sharded weights were summed by the backward pass."""
        parameters = policy.trainable_parameters()
        if apart := [parameter for parameter in parameters.values() if not is_spread(parameter)]:
            self.devices.sum_gradients(apart)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        norm = whole(torch.nn.utils.get_total_norm(list(gradients.values())))
        if not bool(norm.isfinite()):
            largest = max(gradients, key=lambda name: float(whole(gradients[name].abs().max())))
            raise NonFiniteError(
                f"role {role!r}, step {step}: gradient of {largest!r} is not finite in its norm, though each of its entries is, in every "
                "process. Nothing was updated."
            )
        return norm


def phases_of(objective: Objective) -> tuple[Phase, ...]:
    """List the phases of an objective.

    Raises:
        ValueError: it gives something else.
    """
    given: Any = objective.phases()
    if isinstance(given, tuple | list) and all(isinstance(phase, Phase) for phase in given):
        return tuple(given)
    wrong = next((phase for phase in given if not isinstance(phase, Phase)), None) if isinstance(given, tuple | list) else given
    raise ValueError(
        f"{type(objective).__name__}.phases must return a tuple of Phase, `return (Phase(...),)` for one; "
        f"{'it holds' if wrong is not given else 'it returned'} {type(wrong).__name__}"
    )


def yielded(phase: Phase, batch: ScoredBatch, update: int) -> Iterator[Loss]:
    """Yield the losses of an update.

    Raises:
        ValueError: the phase gives something else.
    """
    given: Any = phase.losses(batch, update)
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise ValueError(f"{_source(phase)}, the losses of {_names(phase)}, must `yield` each Loss; it returned {type(given).__name__}")
    for loss in given:
        if not isinstance(loss, Loss):
            raise ValueError(
                f"{_source(phase)}, the losses of {_names(phase)}, must yield Loss objects, `yield Loss(value)`; it yielded "
                f"{type(loss).__name__}"
            )
        yield loss


def _source(phase: Phase) -> str:
    """Name of the function that gives the losses, for messages."""
    losses = phase.losses
    return losses.__qualname__ if isinstance(losses, FunctionType | MethodType) else repr(losses)


def _note_scale(phase: Phase, scale: float, metrics: Metrics) -> None:
    for role in phase.trains:
        metrics.add(f"loss_scale/{role}", torch.tensor(scale), 1)


def _names(phase: Phase) -> str:
    return ", ".join(map(repr, phase.trains))


def _require_finite(values: list[Tensor], sums: Mapping[str, tuple[Tensor, Tensor]], phase: Phase, batch: ScoredBatch) -> None:
    """Refuse losses and metrics that are not finite. All are checked at once, so that the device is waited for once per phase."""
    numbers = [*values, *(number for pair in sums.values() for number in pair)]
    finite = on_host(numbers).isfinite().tolist()
    if all(finite):
        return
    first = finite.index(False)
    name = None if first < len(values) else [*sums][(first - len(values)) // 2]
    what = "loss is" if name is None else f"the metric {name!r} of {_source(phase)} must be a finite (sum, count), and one of them is"
    raise NonFiniteError(
        f"role {_names(phase)}, step {batch.progress.step}: {what} {numbers[first].item()}. {blame(phase.trains, batch.trajectories)} "
        "Nothing was updated."
    )


def _bad_gradient(policy: Policy) -> str | None:
    """Name of the first weight with a gradient that is not finite in this process; None if all are finite."""
    every = {name: local(p.grad) for name, p in policy.trainable_parameters().items() if p.grad is not None}
    gradients = {name: gradient for name, gradient in every.items() if gradient.numel()}  # a process may have no part of a small tensor
    if not gradients or bool(torch.nn.utils.get_total_norm(list(gradients.values()), norm_type=float("inf")).isfinite()):
        return None
    return next(name for name, gradient in gradients.items() if not bool(gradient.isfinite().all()))


def _require_finite_gradients(role: str, policy: Policy, phase: Phase, batch: ScoredBatch) -> None:
    if (name := _bad_gradient(policy)) is not None:
        raise NonFiniteError(
            f"role {role!r}, step {batch.progress.step}: gradient of {name!r} is not finite. {blame(phase.trains, batch.trajectories)} "
            "Nothing was updated."
        )
