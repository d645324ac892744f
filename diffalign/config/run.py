"""Run from a YAML file: reading, checking, writing the full configuration, and building."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from ..core import (
    Aggregation,
    AlignmentLoop,
    ConfigError,
    Devices,
    Hook,
    Listed,
    Policy,
    Prompt,
    PromptSource,
    RewardFunction,
    Sharding,
    SingleProcess,
    Sourced,
)
from ..core.demands import require
from ..core.given import require_drawn
from ..core.learning_rates import require_factors
from ..core.scores import weighed
from ..core.scoring import named_rewards, reward_name, rewards_by_source
from ..placement import placed
from ..tracking import Trackers
from .anchoring import anchored
from .blueprint import Part, build, build_all, described, plain, require_found
from .errors import listed, nearest, refused, together
from .files import built_in, locate, read_run, read_yaml, write_yaml
from .overrides import override
from .resolution import resolve
from .shorthand import written_out
from .signature import MISSING, Parameter, parameters, words
from .sources import make_importable, remember, sources

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(?:[.:][A-Za-z_]\w*)+")

_NOT_IN_FILES = ("devices", "sharding", "meter")

USUAL: Mapping[str, str] = {"optimizers": "AdamW", "prompts": "PromptFile", "evaluation": "HeldOutEvaluation"}
"""Keys of a run whose parts may leave out their class -> the class that is meant."""


@attrs.frozen
class Beside:
    """Keys of a run file that the loop does not take.

    Args:
        policy: the weights being aligned; the objective gets it
        total: steps of the run
        checkpoint_every: steps between checkpoints
        checkpoint_keep: number of latest checkpoints that are kept, beside the best one
        evaluation: hook that evaluates the weights; it runs before the other hooks
    """

    policy: Policy
    total: int = attrs.field(default=100, validator=attrs.validators.ge(1))
    checkpoint_every: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    checkpoint_keep: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    evaluation: Hook | None = None


def keys() -> dict[str, Parameter]:
    """Keys of a run file, in the order in which they are written."""
    loop, beside = parameters(AlignmentLoop) or {}, parameters(Beside) or {}
    known = {"policy": beside["policy"], **{name: loop[name] for name in loop if name not in _NOT_IN_FILES}, **beside}
    return {name: attrs.evolve(parameter, usual=USUAL.get(name, "")) for name, parameter in known.items()}


@attrs.frozen
class Run:
    """Run file whose keys are resolved and checked. Nothing is built or written yet.

    Args:
        name: name of the file, without folder and suffix
        tree: key -> plain values and parts, defaults included
    """

    name: str
    tree: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.tree["folder"])

    def sources(self) -> dict[str, Path]:
        """Find the source files of the user's own parts, with what they import: see `sources.sources`."""
        return sources(_modules(self.tree))

    def yaml(self) -> str:
        """Write the resolved configuration as YAML, which gives the same run again."""
        return write_yaml(plain(self.tree))

    def build(self, hooks: Sequence[Hook] = (), devices: Devices | None = None, sharding: Sharding | None = None) -> AlignmentLoop:
        """Build the loop: see `build_evaluated`."""
        return self.build_evaluated(hooks, devices, sharding)[0]

    def build_evaluated(
        self, hooks: Sequence[Hook] = (), devices: Devices | None = None, sharding: Sharding | None = None
    ) -> tuple[AlignmentLoop, Hook | None]:
        """Build the loop and its evaluation. Parts that are quick to build come before the policy, so that their errors come early.

        Args:
            hooks: further hooks, which come after the evaluation and the hooks of the file
            devices: the processes of the run; None means only this one
            sharding: shards the weights; the policy then leaves its network on the host. None keeps all weights in each process

        Raises:
            ConfigError: constructors raised errors; one message has those of all quick parts, and says if the policy's files are missing.
        """
        _check_devices(self.tree["policy"])
        errors: list[ConfigError] = []
        later = ("evaluation", "rewards")  # what is on this machine comes first in the message
        keys = [*(key for key in self.tree if key not in ("policy", "objective", *later)), *later]
        made = build_all({key: self.tree[key] for key in keys}, errors)
        require_found(self.tree["policy"], errors)
        if errors:
            raise together(errors)
        self._check_weights(made["aggregation"], made["rewards"], made["prompts"])
        prompts = made["prompts"].prompts if isinstance(made["prompts"], Listed) else ()
        held_out = getattr(made["evaluation"], "held_out", ())
        try:
            require_factors(made["lr_factor"], made["total"])
            rewards = rewards_by_source(named_rewards(made["rewards"]), made["prompts"])
            require([made["sampler"], *rewards.values(), *made["hooks"]], list(map(Prompt.of, prompts)))
            _check_sources(made["prompts"], held_out)
        except ConfigError:
            raise
        except ValueError as error:
            raise refused("", error) from error
        _check_apart(made["evaluation"], rewards)
        _check_scored({**rewards, **getattr(made["evaluation"], "rewards", {})}, held_out)
        torch.manual_seed(made["seed"])  # new adapters are drawn from torch's own generator
        policy = build(self.tree["policy"], {"sharding": sharding})
        _check_prompts(policy, "prompts", prompts)
        _check_prompts(policy, "evaluation.prompts", held_out)
        made["objective"] = build(self.tree["objective"], {"policy": policy, "sharding": sharding})
        evaluation = [] if made["evaluation"] is None else [made["evaluation"]]
        made["hooks"] = (*evaluation, *made["hooks"], *hooks)
        made["devices"], made["sharding"] = devices or SingleProcess(), sharding
        try:
            loop = AlignmentLoop(**{key: value for key, value in made.items() if key in attrs.fields_dict(AlignmentLoop)})
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            raise refused("", error) from error
        return loop, made["evaluation"]

    def _check_weights(
        self, aggregation: Aggregation, rewards: RewardFunction | Mapping[str, RewardFunction], prompts: PromptSource
    ) -> None:
        names = rewards if isinstance(rewards, Mapping) else [reward_name(rewards)]
        weights = getattr(aggregation, "weights", None) or dict.fromkeys(names, 1.0)
        earning = weighed(names, weights)
        for source, mine in (prompts.rewarded if isinstance(prompts, Sourced) else {}).items():
            if mine and set(mine) <= set(names) and not set(mine) & set(earning):
                raise ConfigError(
                    f"prompts.sources.{source}: none of its rewards ({listed(mine, 'and')}) has a weight in aggregation.weights, so its "
                    "pictures earn nothing. Give one a weight, or write rewards: [] for prompts that are only held."
                )
        for name in weights:
            if name not in names:
                known = listed(names, "and")
                raise ConfigError(f"aggregation.weights.{name}: no reward is called {name!r}; the run has {known}.{nearest(name, names)}")


def parse(run: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run.

    Args:
        run: a run file, a run folder (its config.yaml), or the name of a built-in run
        overrides: arguments as on the command line, ["--sampler.steps", "6", "--objective.beta=2"]

    Raises:
        ConfigError: there is no such run, or the configuration cannot be built. One message names the place, what must hold, and what came.
    """
    file = locate(str(run))
    content, name = read_run(file), file.stem
    if Path(run).is_dir():  # the folder may have been moved since it was written
        content, name = {**content, "folder": str(run)}, file.absolute().parent.name
        remember(Path(run))
    elif file not in built_in().values():
        make_importable(file.parent)
    return _resolved(name, _overridden(content, overrides), file.absolute().parent)


def parse_text(text: str, name: str = "run", overrides: Sequence[str] = ()) -> Run:
    """Parse the text of a run file, see `parse`."""
    content = read_yaml(text, name)
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold keys (policy: ..., objective: ..., ...); got {type(content).__name__}")
    return _resolved(name, _overridden(content, overrides))


def _overridden(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Keys of a run file with those of the command line, both without short forms of optimizers."""
    return written_out(override(written_out(content), overrides))


def _resolved(name: str, content: dict[str, Any], beside: Path | None = None) -> Run:
    known = keys()
    for key in content:
        if key not in known:
            raise ConfigError(f"{key} is no key of a run, which has {listed(known, 'and')}.{nearest(str(key), known)}")
    tree: dict[str, Any] = {}
    for key, parameter in known.items():
        if key in content:
            tree[key] = resolve(content[key], parameter, key)
        elif parameter.default is MISSING:
            raise ConfigError(f"{key} is missing: a run needs it ({words(parameter.hint)}).")
        else:
            tree[key] = described(parameter.default, key)
    _check_numbers(tree)
    if tree["folder"] is None:
        tree["folder"] = Path("runs") / name
    tree["hooks"] = [_named(hook, name) for hook in tree["hooks"]]
    return Run(name, {key: value if key == "folder" else anchored(value, beside) for key, value in tree.items()})


def _named(hook: Any, name: str) -> Any:
    """Name the project of trackers after the configuration, where the file names none."""
    if not isinstance(hook, Part) or hook.target is not Trackers or hook.arguments["project"] is not None:
        return hook
    return attrs.evolve(hook, arguments={**hook.arguments, "project": name})


def _modules(node: Any) -> Iterator[str]:
    """Names of the modules of a resolved value, by the names of its parts and by texts that are import paths."""
    if isinstance(node, Part):
        yield from filter(None, (_module_of(node.name), getattr(node.target, "__module__", None)))
        yield from _modules(node.arguments)
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _modules(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _modules(value)
    elif isinstance(node, str) and _IMPORT_PATH.fullmatch(node):
        yield from filter(None, [_module_of(node)])


def _module_of(path: str) -> str:
    """Name of the loaded module with which an import path begins; "" if there is none."""
    names = path.replace(":", ".").split(".")
    return next((module for length in range(len(names), 0, -1) if (module := ".".join(names[:length])) in sys.modules), "")


def _check_devices(node: Any) -> None:
    """Check that the devices exist. The policy would check its device itself, but only after rewards have been loaded."""
    for name, value in node.arguments.items() if isinstance(node, Part) else ():
        if name == "device" and isinstance(value, str):
            try:
                placed(value)
            except ValueError as error:
                raise refused(node.where, error) from error
        _check_devices(value)


def _check_sources(prompts: PromptSource, held_out: Sequence[Prompt]) -> None:
    """Check that held-out prompts are of sources that the run has."""
    if not isinstance(prompts, Sourced):
        return
    for source in {prompt.source for prompt in held_out} - {None, *prompts.rewarded}:
        raise ConfigError(
            f"evaluation.prompts must name sources of the run, which are {listed(prompts.rewarded, 'and')}; got {source!r}."
            f"{nearest(str(source), prompts.rewarded)}"
        )


def _check_apart(evaluation: Hook | None, rewards: Mapping[str, RewardFunction]) -> None:
    """Check that no reward of the evaluation has the name of a trained one."""
    if evaluation is None:
        return
    from ..evaluation.held_out import HeldOutEvaluation

    if isinstance(evaluation, HeldOutEvaluation):
        evaluation.require_apart(rewards)


def _check_scored(rewards: Mapping[str, RewardFunction], held_out: Sequence[Prompt]) -> None:
    """Check that every reward can score all held-out prompts."""
    try:
        require(rewards.values(), held_out)
    except ConfigError as error:
        raise ConfigError(f"evaluation.prompts: {error}") from error


def _check_prompts(policy: Policy, key: str, prompts: Iterable[Prompt | str]) -> None:
    """Check that the policy can read every prompt and draw every image size that a prompt asks for."""
    try:
        require_drawn(policy, prompts)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_numbers(tree: dict[str, Any]) -> None:
    """Check the limits of the loop's own numbers, long before the loop is built."""
    for name, field in {**attrs.fields_dict(AlignmentLoop), **attrs.fields_dict(Beside)}.items():
        if name in tree and field.validator is not None:
            try:
                field.validator(None, field, tree[name])
            except (ValueError, TypeError) as error:
                raise refused("", error) from error
