"""Evaluation during training, on prompts that are not trained on."""

import json
from collections.abc import Iterable, Mapping, Sequence

import attrs

from diffalign.core import AlignmentLoop, ConfigError, Hook, Listed, Prompt, Report, RewardFunction
from diffalign.core.demands import reach
from diffalign.core.unessential import unessential
from diffalign.durable import write_whole
from diffalign.prompts import read_prompts

from .evaluate import DEFAULT_FEATURES, evaluate
from .features import Features
from .pictures import contact_sheet
from .result import Evaluation


def read_held_out(files: str | Mapping[str, str]) -> list[Prompt]:
    """The prompts of a file, or of files by the source that they belong to."""
    if isinstance(files, str):
        return read_prompts(files)
    return [Prompt(str(prompt), prompt.metadata, source) for source, file in files.items() for prompt in read_prompts(file)]


@attrs.define(eq=False)
class HeldOutEvaluation(Hook):
    """Evaluates on prompts that are not trained on: before the first step, every `every` steps, and after the last step.

    It evaluates the average of the weights if the run has one, always with equal prompts and noise. It writes `evaluation.json` and
    `images/step-NNNNNN.png` into the run folder. Hooks after it find the results in `loop.evaluations`.

    Args:
        prompts: prompt file, see `PromptFile.path`; for a run whose prompts are a `Mixture`, a file for each source by its name, so that
            its rewards score them. The prompts of one file alone are scored by all rewards
        every: steps between evaluations; None evaluates only before and after training
        samples: samples per prompt
        steps: denoising steps; None takes those of a few-step student, else 28
        seed: seed of the noise
        rewards: further rewards that are not trained on, under other names than those of the loop, which are measured as well
        pictures: number of prompts whose images are kept
        features: features by name on which diversity is measured
        rows: network rows per call
    """

    prompts: str | Mapping[str, str]
    every: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    samples: int = attrs.field(default=4, validator=attrs.validators.ge(2))
    steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    seed: int = 0
    rewards: Mapping[str, RewardFunction] = attrs.field(factory=dict)
    pictures: int = attrs.field(default=6, validator=attrs.validators.ge(0))
    features: Mapping[str, Features] = attrs.field(factory=lambda: dict(DEFAULT_FEATURES))
    rows: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    results: list[Evaluation] = attrs.field(factory=list, init=False)
    _prompts: list[Prompt] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._prompts = read_held_out(self.prompts)

    @property
    def held_out(self) -> Sequence[Prompt]:
        """Prompts of the files."""
        return self._prompts

    def reach(self) -> None:
        """Refuse servers of held-out rewards, and files of features, that are not there."""
        reach([*self.rewards.values(), *self.features.values()])

    def require_apart(self, trained: Iterable[str]) -> None:
        """Refuse a further reward that has the name of a trained one, in whose place it would be measured.

        Args:
            trained: names of the rewards that the run trains on

        Raises:
            ConfigError: there is one.
        """
        for name in trained:
            if name in self.rewards:
                raise ConfigError(
                    f"evaluation.rewards.{name} must have another name: the run trains on a reward {name!r}, which is measured as well. "
                    "Rename it, or remove it if both are the same."
                )

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self.require_apart(loop.named_rewards())
        self._evaluate(loop, step)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        done = report.step + 1
        if self.every is not None and done % self.every == 0 and done < report.total:
            self._evaluate(loop, done)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if error is None and (not self.results or self.results[-1].step != step):
            self._evaluate(loop, step)

    def _evaluate(self, loop: AlignmentLoop, step: int) -> None:
        with loop.ledger.stage("evaluation"):
            result = evaluate(
                loop.evaluation_policy(),
                self._prompts,
                {**loop.named_rewards(), **self.rewards},
                features=self.features,
                samples=self.samples,
                steps=self.steps,
                seed=self.seed,
                step=step,
                rows=self.rows,
                pictures=self.pictures,
                devices=loop.devices,
                lockstep=loop.lockstep,
            )
        result = attrs.evolve(result, repeated=self.every is not None)
        self.results.append(result)
        loop.evaluations.append(result)
        if loop.folder is not None and loop.devices.rank == 0:
            self._write(loop, result)

    def _write(self, loop: AlignmentLoop, result: Evaluation) -> None:
        assert loop.folder is not None
        file = loop.folder / "evaluation.json"
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        entries = [entry for entry in entries if entry["step"] < result.step] + [
            {**result.summary(), "also_trained": _also_trained(loop, result)}
        ]
        (loop.folder / "images").mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(entries, indent=1))
        if len(result.images):
            with unessential(f"pictures of {loop.folder / 'images'}"):
                sheet = contact_sheet(result.images, [str(prompt) for prompt in result.prompts[: len(result.images)]])
                sheet.save(loop.folder / "images" / f"step-{result.step:06d}.png")


def _also_trained(loop: AlignmentLoop, result: Evaluation) -> int | None:
    """Count the held-out prompts that the run also trains on; None if the source of prompts has no list."""
    if not isinstance(loop.prompts, Listed):
        return None
    trained = set(map(str, loop.prompts.prompts))
    return sum(str(prompt) in trained for prompt in result.prompts)
