"""Subject of `evaluate` and `compare`: the weights of a run, and how they are measured."""

import argparse
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .suites import Suite

if TYPE_CHECKING:
    from ..config import Run
    from ..core import AlignmentLoop, Devices, Prompt, RewardFunction
    from ..evaluation import Features, HeldOutEvaluation


@attrs.frozen
class _Unread:
    """Prompts that a run was trained on, and that its measurement does not need: their file may be gone."""

    prompts: "Sequence[Prompt]" = ()  # a source of a mixture must list its prompts

    def draw(self, step: int, count: int) -> "list[Prompt]":
        raise AssertionError("a run that is measured draws no prompts to train on")


def _without_files(prompts: Any) -> Any:
    """Put `_Unread` in the place of a prompt file, or of each one in a mixture. Prompts are as in `Run.tree`."""
    from ..config.blueprint import Part
    from ..prompts import Mixture, PromptFile, Source

    if isinstance(prompts, Mapping):
        return {name: _without_files(inner) for name, inner in prompts.items()}
    if not isinstance(prompts, Part) or prompts.target not in (Mixture, PromptFile, Source):
        return prompts
    if prompts.target is PromptFile:
        return _Unread()
    return attrs.evolve(prompts, arguments=_without_files(prompts.arguments))


@attrs.frozen(eq=False)
class Subject:
    """Run with the checkpoint that is measured.

    Args:
        name: name in the output
        job: the run
        folder: folder of the run; None for a run file
        checkpoint: folder of the checkpoint; None for the untrained weights
        prompts: prompt file that it is measured on; None if it is that of its own evaluation
    """

    name: str
    job: "Run"
    folder: Path | None
    checkpoint: Path | None
    prompts: str | None = None

    @classmethod
    def of(cls, text: str, overrides: Sequence[str] = ()) -> "Subject":
        """Find the subject that a word of the command line names.

        Raises:
            ConfigError: there is no such run.
            CheckpointError: the run folder has no complete checkpoint.
        """
        from .. import config
        from ..core import CheckpointError
        from ..runs.snapshot import complete_checkpoints

        path = Path(text)
        if (path / "manifest.json").exists():
            run = path.absolute().parent
            bare = not (path / "config.yaml").exists() and (run / "config.yaml").exists()
            job = config.parse(run if bare else path, overrides)
            return cls(f"{run.name}/{path.absolute().name}", job, run, path)
        job = config.parse(text, overrides)
        if not path.is_dir():
            return cls(job.name, job, None, None)
        found = complete_checkpoints(path)
        if not found:
            raise CheckpointError(f"{path} must hold a complete checkpoint step-*/ to be evaluated; there is none")
        return cls(path.absolute().name, job, path, found[-1])

    def measured_on(self, prompts: str | None) -> "Subject":
        """Put a prompt file in the place of the run's own, which are then not read; None leaves those.

        A `Mixture` is still built, without its files, because it says which rewards score which prompts.
        """
        from ..config.blueprint import Part
        from ..evaluation import HeldOutEvaluation

        if prompts is None:
            return self
        tree = dict(self.job.tree)
        held_out, tree["prompts"] = tree["evaluation"], _without_files(tree["prompts"])
        if isinstance(held_out, Part) and held_out.target is HeldOutEvaluation:
            tree["evaluation"] = attrs.evolve(held_out, arguments={**held_out.arguments, "prompts": prompts})
        return attrs.evolve(self, job=attrs.evolve(self.job, tree=tree), prompts=prompts)

    def build(self, devices: "Devices") -> "tuple[AlignmentLoop, int]":
        """Build the loop with the checkpoint's weights; also returns the number of steps that they were trained."""
        from ..runs.snapshot import load
        from ..threads import take_fair_threads

        # prompts from elsewhere need not have what the run's rewards need
        tree = self.job.tree if self.prompts is None else {**self.job.tree, "evaluation": None}
        loop = attrs.evolve(self.job, tree=tree).build(devices=devices)
        take_fair_threads(loop.objective.policy.device)
        return loop, 0 if self.checkpoint is None else load(loop, self.checkpoint)

    def evaluation(self) -> "HeldOutEvaluation | None":
        """Build the run's own evaluation, without the policy."""
        from ..config.blueprint import build
        from ..evaluation import HeldOutEvaluation

        hook = build(self.job.tree["evaluation"], {})
        return hook if isinstance(hook, HeldOutEvaluation) else None

    def rewards(self, evaluation: "HeldOutEvaluation | None") -> "dict[str, RewardFunction]":
        """Build the rewards that the run trains on or only evaluates, each held to its sources of prompts, without the policy."""
        from ..config.blueprint import build
        from ..core.scoring import named_rewards, rewards_by_source

        named = rewards_by_source(named_rewards(build(self.job.tree["rewards"], {})), build(self.job.tree["prompts"], {}))
        if evaluation is None:
            return named
        evaluation.require_apart(named)
        return {**named, **evaluation.rewards}

    def configuration(self, reward: str, evaluation: "HeldOutEvaluation | None") -> Any:
        """Configuration of one of `rewards`, in the form of a run file. Rewards of one configuration give equal scores.

        Args:
            reward: its name
            evaluation: the run's own evaluation
        """
        from ..config.blueprint import plain

        trained, held_out = self.job.tree["rewards"], self.job.tree["evaluation"]
        if evaluation is None or reward not in evaluation.rewards:
            return plain(trained[reward] if isinstance(trained, Mapping) else trained)
        given = held_out.arguments.get("rewards")
        return plain(given[reward] if isinstance(given, Mapping) and reward in given else held_out)  # one may bring rewards of its own

    @property
    def identity(self) -> str:
        """Digest of the weights and of the configuration."""
        manifest = b"" if self.checkpoint is None else (self.checkpoint / "manifest.json").read_bytes()
        return hashlib.sha256(manifest + self.job.yaml().encode()).hexdigest()


@attrs.frozen(eq=False)
class Measuring:
    """Prompts, rewards and settings of a measurement.

    Args:
        prompts: prompts that are drawn
        rewards: all rewards by name, those of the command line among them
        further: those of the command line
        settings: keyword arguments of `diffalign.evaluation.evaluate`
    """

    prompts: "list[Prompt]"
    rewards: "Mapping[str, RewardFunction]"
    further: "Mapping[str, RewardFunction]"
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, subject: Subject, options: argparse.Namespace, suite: Suite | None = None) -> "Measuring":
        """Take each setting from the command line, else from the run's own evaluation, else from the defaults; see `Subject.measured_on`.

        Args:
            subject: run or pipeline that is measured, on the prompts of its `prompts`, else on those of its own evaluation
            options: options of the command line
            suite: prompts and rewards in place of the run's own

        Raises:
            ConfigError: there are no prompts, a reward cannot score some of them, a part cannot be built, or two rewards have one name.
        """
        from ..core import ConfigError
        from ..core.demands import require
        from ..evaluation.evaluate import DEFAULT_FEATURES
        from ..evaluation.held_out import read_held_out

        file = subject.prompts
        prompts = None if file is None else read_held_out(file)
        hook = subject.evaluation()
        asked = built_rewards(options.reward)
        if suite is None:
            rewards = {**kept_apart(subject.rewards(hook), asked), **asked}
        else:
            rewards = {**built_rewards([f"{name}={part}" for name, part in suite.rewards.items() if name not in asked]), **asked}
        if prompts is None:
            if hook is None:
                raise ConfigError(f"--prompts must name a prompt file, because the run {subject.name} has no evaluation with prompts")
            prompts = [*hook.held_out]
        chosen: Mapping[str, Features] = built_features(options.features) or (hook.features if hook else DEFAULT_FEATURES)
        settings: dict[str, Any] = {
            "samples": hook.samples if hook else 4,
            "steps": hook.steps if hook else None,
            "seed": hook.seed if hook else 0,
        }
        settings |= {name: value for name in settings if (value := getattr(options, name)) is not None}
        if settings["samples"] < 2:
            raise ConfigError("--samples must be at least 2: one image of a prompt has no diversity")
        require(rewards.values(), prompts)
        return cls(
            prompts,
            rewards,
            asked,
            {**settings, "features": chosen, "rows": options.rows, "pictures": options.pictures},
        )


def kept_apart(rewards: "Mapping[str, RewardFunction]", asked: Iterable[str]) -> "Mapping[str, RewardFunction]":
    """Return the rewards of runs, if those of the command line have other names: under an equal one the wrong reward would be measured.

    Args:
        rewards: rewards of the runs, by name
        asked: names of the rewards of the command line

    Raises:
        ConfigError: a name is in both.
    """
    from ..core import ConfigError

    for name in asked:
        if name in rewards:
            raise ConfigError(f"--reward must have another name than the run's own rewards; {name!r} is one. Write --reward OTHER=PART.")
    return rewards


def built_rewards(texts: Sequence[str]) -> "dict[str, RewardFunction]":
    """Build the rewards of the command line, by name; a reward without a name gets its own."""
    from ..core import RewardFunction
    from ..core.scoring import reward_name

    return _built(texts, RewardFunction, "--reward", reward_name)


def built_features(texts: Sequence[str]) -> "dict[str, Features]":
    """Build the features of the command line, by name; features without a name get that of their class."""
    from ..evaluation import Features

    return _built(texts, Features, "--features", lambda part: type(part).__name__.removesuffix("Features").lower())


def _built(texts: Sequence[str], slot: Any, option: str, name_of: Any) -> dict[str, Any]:
    from ..config.blueprint import build
    from ..config.files import read_yaml
    from ..config.resolution import resolve
    from ..config.signature import Parameter
    from ..core import ConfigError

    parts: dict[str, Any] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        named = bool(equals) and name.isidentifier()
        part = build(resolve(read_yaml(rest if named else text, option), Parameter(option, slot), option), {})
        key = name if named else name_of(part)
        if key in parts:
            raise ConfigError(f"{option} must give each part a name of its own; two are called {key!r}. Write {option} NAME=PART.")
        parts[key] = part
    return parts
