"""Hacking alarm: the trained reward rises while held-out rewards or diversity fall."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import AlignmentLoop, ConfigError, Hook, Partial, Prompt, Report, RewardFunction, Scores, agree, score
from diffalign.core.demands import reach, require
from diffalign.core.unessential import say
from diffalign.core.words import allowed_word
from diffalign.durable import write_whole

from .diversity import vendi_score
from .features import Features
from .reactions import Action, reaction, take_back
from .recorded import read_lines, read_list
from .rule import Rule

WATCH, ALARMS = "watch.jsonl", "alarms.json"


@attrs.frozen
class Alarm:
    """Record of one alarm.

    Args:
        step: steps done
        kind: "diversity", or the name of a held-out reward
        message: a full sentence
        action: the reaction
    """

    step: int
    kind: str
    message: str
    action: str


_SUMS = ("images", "scores", "their squares", "groups", "squared images of a group", "squared scores of a group", "their product")


def forget(folder: Path) -> None:
    """Remove the files that an alarm of an earlier run has written. The alarm of a new run writes after its first step."""
    for name in (WATCH, ALARMS):
        (folder / name).unlink(missing_ok=True)


_L_GMD = "diversity/l_gmd"


@attrs.define(eq=False)
class HackingAlarm(Hook):
    """Warns when the trained reward rises while held-out rewards or diversity fall.

    At every step, held-out rewards score some of the step's own samples; a step in which no reward of the run applies is not watched. The
    steps are cut in two parts, at the step where the fall is clearest, and the mean after the cut is compared with the mean before it
    (`Series` estimates the noise from the prompts of a step and from neighbouring steps). With at least w steps on both sides, the alarm
    rings when for two steps in a row

        hacking:   a held-out reward fell by `threshold` standard errors and by `fall` of its samples' spread, and the trained reward rose
                   by `rise` standard errors
        collapse:  diversity (L-GMD of latents within the group) fell by `threshold` standard errors and by `diversity_fall` nats

    L-GMD hardly sees that a policy has given up most kinds of pictures while each kind still varies. With `features`, diversity is the
    logarithm of the Vendi score instead, the effective number of different pictures of a prompt: the pictures of all groups with the same
    text, `images` of a step in all, mean over prompts.

    It reports on stderr, in `alarms.json` and in the report page; `watch.jsonl` holds the series. Each kind rings once in a run. The alarm
    only watches; the reaction named by `action` changes the run.

    Args:
        rewards: rewards by name that are not trained on; without any, only diversity is watched
        action: "warn" only reports. "stop" ends the run after this step as Ctrl-C does, with a checkpoint; a resumed run does not ring
            again. "temper" multiplies the aggregated reward by `factor`; for an objective with an inverse temperature, this multiplies
            beta, so the reward pulls less. It acts again after two windows if the fall continues. It does not change an objective that
            standardises rewards itself
        window: w; None is a thirtieth of the run, at least 3
        images: samples per step and process that held-out rewards score, from all prompts of the step; with fewer, hacking is seen later
        threshold: standard errors by which a held-out reward or diversity must have fallen
        rise: standard errors by which the trained reward must have risen
        fall: least fall of a held-out reward, in standard deviations of its samples at the beginning
        diversity_fall: least fall of diversity in nats; a fall of ln 2 halves the typical distance, or the effective number
        features: features of pictures, such as `PixelFeatures()`; None watches L-GMD, which needs no picture
        factor: factor of "temper"
    """

    rewards: Mapping[str, RewardFunction] = attrs.field(factory=dict)
    action: Action = attrs.field(default="warn", validator=allowed_word)
    window: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(2)))
    images: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    threshold: float = attrs.field(default=4.5, validator=attrs.validators.gt(0.0))
    rise: float = attrs.field(default=2.0, validator=attrs.validators.gt(0.0))
    fall: float = attrs.field(default=0.25, validator=attrs.validators.ge(0.0))
    diversity_fall: float = attrs.field(default=0.7, validator=attrs.validators.ge(0.0))
    features: Features | None = None
    factor: float = attrs.field(default=0.5, validator=[attrs.validators.gt(0.0), attrs.validators.lt(1.0)])
    alarms: list[Alarm] = attrs.field(factory=list, init=False)
    _watched: list[dict[str, Any]] = attrs.field(factory=list, init=False, repr=False)
    _quiet: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)

    def reach(self) -> None:
        """Refuse held-out rewards whose server is not there."""
        reach(self.rewards.values())

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that a held-out reward cannot score.

        Raises:
            ConfigError: the message names the first such prompt and what it lacks.
        """
        try:
            require(self.rewards.values(), prompts)
        except ConfigError as error:
            raise ConfigError(f"HackingAlarm.rewards: {error}") from error

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if names := set(self.rewards) & set(loop.named_rewards()):
            raise ValueError(f"HackingAlarm.rewards must not be trained on; {sorted(names)[0]!r} is a reward of the run")
        self._watched, self.alarms, self._quiet = [], [], {}
        if loop.folder is not None and step > 0:
            self._watched = [line for line in read_lines(loop.folder / WATCH) if line["step"] < step]
            self.alarms = [Alarm(**entry) for entry in read_list(loop.folder / ALARMS) if entry["step"] <= step]
        for alarm in self.alarms:
            self._silence(alarm, total)
        if loop.folder is not None or step == 0:  # without a folder, the loop alone knows what was done to it
            take_back(loop)
        for action, _ in {(alarm.action, alarm.step) for alarm in self.alarms}:
            reaction(action, self.factor).resume(loop)
        loop.devices.barrier()  # all processes have read the files before one writes them
        if loop.folder is None or loop.devices.rank != 0:
            return
        loop.folder.mkdir(parents=True, exist_ok=True)
        if step > 0:
            write_whole(loop.folder / WATCH, "".join(json.dumps(line) + "\n" for line in self._watched))
            self._write_alarms(loop.folder)
        else:
            forget(loop.folder)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if "reward" not in report.metrics:  # no reward applied to any sample, so these prompts are others than those that are watched
            return
        with loop.ledger.stage("alarm"):
            judged = self._judged(loop, report)
        line = {"step": report.step, "trained": report.metrics["reward"], **_diversity(report), **judged}
        self._watched.append(line)
        if loop.folder is not None and loop.devices.rank == 0:
            with (loop.folder / WATCH).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if len(self._watched) == 1:
                self._write_alarms(loop.folder)
        found = self.rule().rings(self._watched, report.total)
        place = f"step {report.step + 1} of {report.total}"
        rung = [
            Alarm(report.step + 1, kind, f"{place}: {evidence}", self.action)
            for kind, evidence in found.items()
            if report.step >= self._quiet.get(kind, 0)
        ]
        if rung:
            self._ring(loop, rung, report.total)

    def rule(self) -> Rule:
        """Rule by which the alarm rings; it works for recorded series too."""
        measure = "L-GMD" if self.features is None else "ln Vendi"
        return Rule(self.window, self.threshold, self.rise, self.fall, self.diversity_fall, measure)

    def _judged(self, loop: AlignmentLoop, report: Report) -> dict[str, Any]:
        """Judge some of the step's samples over all processes: mean, standard deviation and error of the mean of each held-out reward,
        and their diversity if it is one of features.
        """
        error: Exception | None = None
        sums = torch.zeros(len(self.rewards), len(_SUMS), dtype=torch.float64)
        diversity = torch.zeros(2, dtype=torch.float64)
        try:
            if self.rewards or self.features is not None:
                sums, diversity = self._sums(loop, report)
        except Exception as caught:
            error = caught
        agree(loop.devices, error)
        count, total, squares, groups, group_counts, group_totals, products = loop.devices.sum(sums).unbind(dim=1)
        mean = total / count.clamp(min=1)
        spread = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        # samples of a prompt are alike, so only the sums over prompts are independent
        residuals = (group_totals - 2 * mean * products + mean.square() * group_counts).clamp(min=0)
        errors = (residuals * groups / (groups - 1).clamp(min=1)).sqrt() / count.clamp(min=1)
        judged: dict[str, Any] = {
            what: {name: value for name, value, number in zip(self.rewards, values.tolist(), count.tolist(), strict=True) if number}
            for what, values in (("held_out", mean), ("spread", spread), ("errors", errors))
        }
        if self.features is not None:
            logarithms, prompts = loop.devices.sum(diversity).tolist()
            judged["diversity"] = logarithms / prompts
        return {**judged, "groups": {name: int(number) for name, number in zip(self.rewards, groups.tolist(), strict=True) if number}}

    @torch.no_grad()
    def _sums(self, loop: AlignmentLoop, report: Report) -> tuple[Tensor, Tensor]:
        """Sums of the held-out rewards, and of the diversity over prompts with their number."""
        trajectories = report.batch.trajectories
        count = len(trajectories.leaves)
        index = torch.linspace(0, count - 1, min(self.images, count)).round().long().to(trajectories.latents.device)
        prompts = [trajectories.condition.prompts[i] for i in trajectories.group[index].tolist()]
        scored, features = [], []
        for start in range(0, len(index), loop.chunk):
            images = loop.objective.policy.decode(trajectories.samples[index[start : start + loop.chunk]])
            if self.rewards:
                scored.append(score(self.rewards, images, prompts[start : start + loop.chunk]))
            if self.features is not None:
                features.append(self.features(images).cpu())
        diversity = _log_vendi(torch.cat(features), prompts) if features else torch.zeros(2, dtype=torch.float64)
        if not scored:
            return torch.zeros(0, len(_SUMS), dtype=torch.float64), diversity
        parts, group = Scores.joined(scored), trajectories.group[index].cpu()
        return torch.stack([_sums_of(parts.partial(name), group) for name in self.rewards]), diversity

    def _ring(self, loop: AlignmentLoop, rung: Sequence[Alarm], total: int) -> None:
        self.alarms.extend(rung)
        for alarm in rung:
            self._silence(alarm, total)
            if loop.devices.rank == 0:
                say(f"HACKING ALARM, {alarm.message}")
        if loop.folder is not None and loop.devices.rank == 0:
            self._write_alarms(loop.folder)
        reaction(self.action, self.factor).act(loop)

    def _silence(self, alarm: Alarm, total: int) -> None:
        again = reaction(alarm.action, self.factor).again
        self._quiet[alarm.kind] = alarm.step + 2 * self.rule().least_window(total) if again else float("inf")

    def _write_alarms(self, folder: Path) -> None:
        write_whole(folder / ALARMS, json.dumps([attrs.asdict(alarm) for alarm in self.alarms], indent=1))


def _sums_of(part: Partial, group: Tensor) -> Tensor:
    """Sums over the pictures [K] that a reward applies to, in the order of `_SUMS`, float64."""
    applies = part.applies.cpu()
    scores, (_, of) = part.values.cpu()[applies].double(), group[applies].unique(return_inverse=True)
    counts = torch.bincount(of).double()
    totals = torch.zeros_like(counts).index_add_(0, of, scores)
    ones = torch.ones_like(scores)
    columns = (ones, scores, scores.square(), torch.ones_like(totals), counts.square(), totals.square(), counts * totals)
    return torch.stack([column.sum() for column in columns])


def _diversity(report: Report) -> dict[str, float]:
    """L-GMD of a step's latents; nothing where each prompt has one sample."""
    return {"diversity": report.metrics[_L_GMD]} if _L_GMD in report.metrics else {}


def _log_vendi(features: Tensor, prompts: Sequence[str]) -> Tensor:
    """Sum over prompts of the logarithm of the Vendi score of their pictures, and the number of prompts: [2], float64."""
    texts = list(map(str, prompts))
    of = torch.tensor([texts.index(text) for text in texts])
    scores = torch.stack([vendi_score(features[of == first]) for first in of.unique()])
    return torch.stack([scores.log().sum(), scores.new_tensor(len(scores))])
