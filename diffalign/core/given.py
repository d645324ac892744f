"""Arguments of a loop in the forms that users write, and the parts above the core that serve as defaults.

The parts above are named and not imported, like entry points, because the core imports nothing above it.
"""

import difflib
import functools
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .average import Average
from .demands import require
from .interfaces import Aggregation, KeepsGraph, Listed, Objective, OptimizerFactory, PromptSource, TrajectorySampler
from .learning_rates import adamw
from .number_fields import is_whole
from .policy import Policy
from .schedule import scalar
from .types import Prompt

RUN = "diffalign.runs.around:run"
PROMPTS = "diffalign.prompts:Prompts"


def usual(name: str) -> Any:
    """Import the object of a name such as `RUN`."""
    return pkgutil.resolve_name(name)


def prompts_of(given: PromptSource) -> PromptSource:
    """Accept a source of prompts, or make one of a list, in a shuffled, endless order.

    The parameter's type is that of the loop's field, because run files are checked by it.

    Raises:
        ValueError: it is neither.
    """
    value: Any = given
    if isinstance(value, list | tuple):
        return usual(PROMPTS)(value)  # type: ignore[no-any-return]
    if isinstance(value, str) or not callable(inspect.getattr_static(type(given), "draw", None)):
        raise ValueError(f'prompts must be a source of prompts, such as PromptFile("file.txt"), or a list of texts; got {given!r}')
    return given


def optimizers_of(given: Mapping[str, OptimizerFactory]) -> dict[str, OptimizerFactory]:
    """Make the table role -> factory. One factory or class alone is for all roles.

    A number is the learning rate of AdamW with weight decay 1e-4, here as in a run file. (`{lr: 1e-4}` of a run file names the arguments
    of torch's AdamW, whose weight decay is 0.01 where none is given.)

    Raises:
        ValueError: an entry is something else.
    """
    value: Any = given
    table = value if isinstance(value, Mapping) else {"default": value}
    return {role: _factory(role, entry) for role, entry in table.items()}


def _factory(role: str, given: Any) -> OptimizerFactory:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return functools.partial(adamw, lr=float(given))
    if not callable(given):
        raise ValueError(
            f"optimizers[{role!r}] must be a learning rate, an optimizer class, or a function of the parameters that gives an optimizer; "
            f"got {type(given).__name__}"
        )
    return given  # type: ignore[no-any-return]


def require_parts(objective: object, sampler: object, aggregation: object, hooks: object, hook_kind: type) -> None:
    """Refuse arguments of the wrong kind. `hook_kind` is the class of hooks.

    Raises:
        ValueError: an argument is of another kind; the message names the first.
    """
    for name, given, kind in (
        ("objective", objective, Objective),
        ("sampler", sampler, TrajectorySampler),
        ("aggregation", aggregation, Aggregation),
    ):
        require_part(name, given, kind)
    if not isinstance(hooks, Sequence):
        raise ValueError(f"hooks must be a list of hooks; got {type(hooks).__name__}")
    for place, hook in enumerate(hooks):
        if not isinstance(hook, hook_kind):
            raise ValueError(f"hooks[{place}] must be a {hook_kind.__name__}; got {_called(hook)}")
        _require_calls(f"hooks[{place}]", hook, hook_kind)


def require_numbers(lr_factor: object, average: object) -> None:
    """Refuse a factor that is neither number nor schedule, and an average that is a bare decay.

    Raises:
        ValueError: one is; the message says what to write.
    """
    factor: Any = lr_factor
    try:
        scalar(factor)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_factor must be a number or a Scalar, such as Cosine(1.0, 0.05); got {_called(factor)}. Write a function of the step as a "
            "class: class Mine(Scalar) with __call__(self, progress)."
        ) from error
    if average is not None and not isinstance(average, Average):
        decay = average if isinstance(average, float) else 0.9
        raise ValueError(f"average must be an Average, or None for none; got {_called(average)}. Write Average({decay}).")


def require_steps(total: object, start: object) -> None:
    """Refuse numbers of steps that a run cannot do.

    Raises:
        ValueError: one is no whole number, `total` is negative, or `start` lies after it.
    """
    for name, given in (("total", total), ("start", start)):
        if not is_whole(given):
            raise ValueError(f"{name} must be a whole number of steps; got {given!r}. Write it without a fraction.")
    steps, first = int(total), int(start)  # type: ignore[call-overload]  # whole numbers
    if steps < 0:
        raise ValueError(f"total must be at least 0 steps; got {steps}. It counts all steps of the run, those that are done as well.")
    if not 0 <= first <= steps:
        raise ValueError(f"start must lie between 0 and total = {steps}; got {first}. It counts the steps that are done, 0 for a new run.")


def _require_calls(name: str, hook: object, kind: type) -> None:
    """Refuse a hook whose methods cannot be called as the loop does, or that has a method of another name in place of them.

    Raises:
        ValueError: it does.
    """
    expected = {
        method: [*inspect.signature(function).parameters][1:] for method, function in vars(kind).items() if inspect.isfunction(function)
    }
    for method, given in expected.items():
        try:
            mine = inspect.signature(getattr(hook, method))
        except (TypeError, ValueError):  # its call will tell
            continue
        try:
            mine.bind(*given)
        except TypeError as error:
            called = f"{name}: {type(hook).__name__}.{method}"
            raise ValueError(f"{called} is called with ({', '.join(given)}); it takes ({', '.join(mine.parameters)})") from error
    if type(hook) is kind or any(_overrides(hook, method, kind) for method in expected):
        return
    known = {word: method for method in expected for word in (method, f"on_{method}", f"{method}_end", f"on_{method}_end")}
    for own, value in vars(type(hook)).items():
        near = difflib.get_close_matches(own, known, 1, 0.8) if callable(value) and not own.startswith("_") else []
        if near:
            raise ValueError(f"{name}: {type(hook).__name__}.{own} is never called; did you mean {known[near[0]]}?")


def _overrides(hook: object, method: str, kind: type) -> bool:
    own = getattr(hook, method)
    return (own.__func__ if inspect.ismethod(own) else own) is not vars(kind)[method]


def require_part(name: str, given: object, kind: type) -> None:
    """Refuse an argument that is no part of a kind.

    Args:
        name: name of the argument in the message
        given: the argument
        kind: class of such parts

    Raises:
        ValueError: it is none.
    """
    if not isinstance(given, kind):
        article = "an" if kind.__name__[0] in "AO" else "a"
        raise ValueError(f"{name} must be {article} {kind.__name__}; got {_called(given)}")


def _called(given: object) -> str:
    return f"the class {given.__name__} itself; call it" if isinstance(given, type) else type(given).__name__


def require_roles(optimizers: Mapping[str, OptimizerFactory], roles: Sequence[str]) -> None:
    """Refuse an optimizer for a role that the objective does not have.

    Raises:
        ValueError: there is one.
    """
    if strangers := set(optimizers) - set(roles) - {"default"}:
        raise ValueError(f"optimizers has an entry {sorted(strangers)[0]!r}; the roles are {', '.join(roles)}, or 'default' for all")


def trainable(role: str, policy: Policy) -> list[nn.Parameter]:
    """Trainable parameters of a role.

    Raises:
        ValueError: there is none.
    """
    parameters = list(policy.trainable_parameters().values())
    if not parameters:
        raise ValueError(f"role {role!r} has nothing to train: no parameter requires grad. Give the policy LoRA, or fork it trainable.")
    return parameters


def refuse_kept(sampler: TrajectorySampler) -> None:
    """Refuse a sampler that keeps the graph of its rollout, where weights are sharded.

    There a call takes all processes, and so does going back through it. The graphs of the calls that a process made for others end with
    the rollout, so that the processes would wait for each other for ever.

    Raises:
        ValueError: it keeps the graph.
    """
    if isinstance(sampler, KeepsGraph) and sampler.keep_graph:
        raise ValueError(
            f"{type(sampler).__name__}.keep_graph must be false where the weights are sharded: the update would go back through calls of "
            "the rollout, which the other processes have left. Set --sampler.keep_graph false, or leave sharding out."
        )


def require_fit(objective: Objective, sampler: TrajectorySampler, prompts: PromptSource, readers: Iterable[object]) -> None:
    """Let parts refuse each other before the first step.

    Args:
        objective, sampler, prompts: parts of the run
        readers: rewards and hooks, of which some need prompts with metadata; so may the sampler, if it holds a reward

    Raises:
        ConfigError: a prompt lacks what a reward needs.
        ValueError: the objective cannot learn from the sampler's trajectories, or the policy cannot read a prompt or draw its size.
    """
    if (outline := sampler.outline(objective.behavior())) is not None:
        objective.require(outline)
    if isinstance(prompts, Listed):
        known = [Prompt.of(prompt) for prompt in prompts.prompts]
        require_drawn(objective.policy, known)
        require((sampler, *readers), known)


def require_drawn(policy: Policy, prompts: Iterable[str]) -> None:
    """Let a policy refuse prompts, of which it must read every one and draw every size that one asks for.

    Raises:
        ValueError: it cannot; the message names the prompt.
    """
    known = [Prompt.of(prompt) for prompt in prompts]
    policy.require(known)
    for size, prompt in {prompt.size: prompt for prompt in known}.items():
        try:
            policy.sized(size)
        except ValueError as error:
            raise ValueError(f"the prompt {str(prompt)!r} has a size that cannot be drawn: {error}") from error
