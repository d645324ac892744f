"""What `evaluate` and `compare` look at: the weights of a run, and how they are measured."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from ..config import Run
    from ..core import AlignmentLoop, Devices, Prompt, RewardFunction
    from ..evaluation import Features, HeldOutEvaluation


@attrs.frozen(eq=False)
class Subject:
    """A run and the checkpoint of it that is looked at.

    Args:
        name: for people
        job: the run
        folder: of the run; None for a run file
        checkpoint: None for the weights as they begin
    """

    name: str
    job: "Run"
    folder: Path | None
    checkpoint: Path | None

    @classmethod
    def of(cls, text: str, overrides: Sequence[str] = ()) -> "Subject":
        """What a word of the command line means.

        Raises:
            ConfigError: no such run.
            CheckpointError: a run folder without a whole checkpoint.
        """
        from .. import config
        from ..core import CheckpointError
        from ..runs.snapshot import complete_checkpoints

        path = Path(text)
        if (path / "manifest.json").exists():
            run = path.absolute().parent
            job = config.parse(path if (path / "config.yaml").exists() else run, overrides)
            return cls(f"{run.name}/{path.absolute().name}", job, run, path)
        job = config.parse(text, overrides)
        if not path.is_dir():
            return cls(job.name, job, None, None)
        found = complete_checkpoints(path)
        if not found:
            raise CheckpointError(f"{path} must hold a whole checkpoint step-*/ to be evaluated; there is none")
        return cls(path.absolute().name, job, path, found[-1])

    def build(self, devices: "Devices") -> "tuple[AlignmentLoop, int]":
        """The loop with the checkpoint's weights, and the steps that they have been trained."""
        from ..runs.snapshot import load
        from ..threads import take_fair_threads

        loop = self.job.build(devices=devices)
        take_fair_threads(loop.objective.policy.device)
        return loop, 0 if self.checkpoint is None else load(loop, self.checkpoint)

    def measured(self) -> "tuple[dict[str, RewardFunction], HeldOutEvaluation | None]":
        """The rewards that the run trains on or only evaluates, and its own evaluation; built without the policy."""
        from ..config.blueprint import build
        from ..core.scoring import named_rewards, rewards_by_source
        from ..evaluation import HeldOutEvaluation

        hook = build(self.job.tree["evaluation"], {})
        hook = hook if isinstance(hook, HeldOutEvaluation) else None
        rewards = rewards_by_source(named_rewards(build(self.job.tree["rewards"], {})), build(self.job.tree["prompts"], {}))
        return {**rewards, **(hook.rewards if hook else {})}, hook

    @property
    def identity(self) -> str:
        """A digest of the weights and of the configuration."""
        manifest = b"" if self.checkpoint is None else (self.checkpoint / "manifest.json").read_bytes()
        return hashlib.sha256(manifest + self.job.yaml().encode()).hexdigest()


@attrs.frozen(eq=False)
class Measuring:
    """How everything is measured: `settings` are keyword arguments of `diffalign.evaluation.evaluate`."""

    prompts: "list[Prompt]"
    rewards: "Mapping[str, RewardFunction]"
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, subject: Subject, options: argparse.Namespace) -> "Measuring":
        """As the command line says, else as the run's own evaluation, else with defaults.

        Raises:
            ConfigError: there are no prompts, or a part that cannot be built.
        """
        from ..core import ConfigError
        from ..evaluation.evaluate import DEFAULT_FEATURES
        from ..evaluation.held_out import read_held_out

        rewards, hook = subject.measured()
        file = options.prompts or (hook.prompts if hook else None)
        if file is None:
            raise ConfigError("--prompts must name a prompt file: the run has no evaluation whose prompts could be taken")
        chosen: Mapping[str, Features] = built_features(options.features) or (hook.features if hook else DEFAULT_FEATURES)
        settings = {"samples": hook.samples if hook else 4, "steps": hook.steps if hook else 28, "seed": hook.seed if hook else 0}
        settings |= {name: value for name in settings if (value := getattr(options, name)) is not None}
        if settings["samples"] < 2:
            raise ConfigError("--samples must be at least 2: one picture of a prompt has no diversity")
        return cls(
            read_held_out(file),
            {**rewards, **built_rewards(options.reward)},
            {**settings, "features": chosen, "rows": options.rows, "pictures": options.pictures},
        )


def built_rewards(texts: Sequence[str]) -> "dict[str, RewardFunction]":
    """Rewards of the command line by name; without one, under their own."""
    from ..core import RewardFunction
    from ..core.scoring import reward_name

    return _built(texts, RewardFunction, "--reward", reward_name)


def built_features(texts: Sequence[str]) -> "dict[str, Features]":
    """Features of the command line by name; without one, under that of their class."""
    from ..evaluation import Features

    return _built(texts, Features, "--features", lambda part: type(part).__name__.removesuffix("Features").lower())


def _built(texts: Sequence[str], slot: Any, option: str, name_of: Any) -> dict[str, Any]:
    from ..config.blueprint import build
    from ..config.files import read_yaml
    from ..config.resolution import resolve
    from ..config.signature import Parameter

    parts: dict[str, Any] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        named = bool(equals) and name.isidentifier()
        part = build(resolve(read_yaml(rest if named else text, option), Parameter(option, slot), option), {})
        parts[name if named else name_of(part)] = part
    return parts
