"""The hacking alarm: trained reward up, and what it stands for down."""

import json
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Aggregation, AlignmentLoop, Hook, Interrupted, Report, RewardFunction, agree, score

from .recorded import read_lines, read_list
from .watch import Move, moved

_CONSECUTIVE = 2
WATCH, ALARMS = "watch.jsonl", "alarms.json"


@attrs.frozen
class Alarm:
    """What the alarm saw.

    Args:
        step: steps done
        kind: "diversity", or the name of a held-out reward
        message: a full sentence
        action: what was done
    """

    step: int
    kind: str
    message: str
    action: str


class Tempered(Aggregation):
    """An aggregation times a factor: where an objective multiplies rewards by beta, the same as factor * beta.

    Args:
        aggregation: what is scaled; a state that it has is passed on, in its own form
        factor: positive
    """

    def __init__(self, aggregation: Aggregation, factor: float) -> None:
        self.aggregation, self.factor = aggregation, factor
        self.weights = aggregation.weights

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        return self.factor * self.aggregation(parts, group)

    def state(self) -> Mapping[str, Any]:
        """That of the inner aggregation, {} where it has none."""
        inner = getattr(self.aggregation, "state", None)
        return {} if inner is None else inner()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        if state:
            self.aggregation.restore(state)  # type: ignore[attr-defined]


@attrs.define(eq=False)
class HackingAlarm(Hook):
    """Watches the trained reward against rewards that are not trained on and against diversity, and says so when they part.

    At every step, held-out rewards score some of the step's own samples. With w steps in a window and all moves in standard errors of the
    last window against the first (`moved`), the alarm rings when for two steps in a row

        hacking:   trained reward >= +rise,  a held-out reward <= -threshold and down by at least `fall` of its samples' spread
        collapse:  diversity (L-GMD of latents within the group) <= -threshold and down by at least `diversity_fall` nats

    It says what it saw on stderr, in `alarms.json` and in the report; `watch.jsonl` holds the series. Each kind rings once a run.

    Args:
        rewards: by name, not trained on; none leaves diversity alone
        action: "warn"; "stop" ends the run after this step as Ctrl-C does, with a checkpoint to resume from (which does not ring again);
            "temper" multiplies the aggregated reward by `factor`, which for an objective with an inverse temperature beta is factor *
            beta: a weaker pull of the reward against the reference. It acts again after two windows if the move goes on. An objective
            that standardises rewards itself is not changed by it
        window: w; None is a twentieth of the run, at least 5
        images: samples per step and process that held-out rewards score, spread over the step's prompts
        threshold: standard errors by which a held-out reward or diversity must have fallen
        rise: standard errors by which the trained reward must have risen
        fall: least fall of a held-out reward, in standard deviations of its samples at the beginning
        diversity_fall: least fall of L-GMD in nats; ln 2 is half the typical distance
        factor: of "temper"
    """

    rewards: Mapping[str, RewardFunction] = attrs.field(factory=dict)
    action: Literal["warn", "stop", "temper"] = "warn"
    window: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(2)))
    images: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    threshold: float = attrs.field(default=4.0, validator=attrs.validators.gt(0.0))
    rise: float = attrs.field(default=2.0, validator=attrs.validators.gt(0.0))
    fall: float = attrs.field(default=0.25, validator=attrs.validators.ge(0.0))
    diversity_fall: float = attrs.field(default=0.7, validator=attrs.validators.ge(0.0))
    factor: float = attrs.field(default=0.5, validator=[attrs.validators.gt(0.0), attrs.validators.lt(1.0)])
    alarms: list[Alarm] = attrs.field(factory=list, init=False)
    _watched: list[dict[str, Any]] = attrs.field(factory=list, init=False, repr=False)
    _streak: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)
    _quiet: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if names := set(self.rewards) & set(loop.named_rewards()):
            raise ValueError(f"HackingAlarm.rewards must not be trained on; {sorted(names)[0]!r} is a reward of the run")
        self._watched, self.alarms, self._streak, self._quiet = [], [], {}, {}
        if loop.folder is not None and step > 0:
            self._watched = [line for line in read_lines(loop.folder / WATCH) if line["step"] < step]
            self.alarms = [Alarm(**entry) for entry in read_list(loop.folder / ALARMS) if entry["step"] <= step]
        for alarm in self.alarms:
            self._silence(alarm, total)
        for _ in {alarm.step for alarm in self.alarms if alarm.action == "temper"}:
            loop.aggregation = Tempered(loop.aggregation, self.factor)
        loop.devices.barrier()  # all have read before one writes
        if loop.folder is not None and loop.devices.rank == 0:
            loop.folder.mkdir(parents=True, exist_ok=True)
            (loop.folder / WATCH).write_text("".join(json.dumps(line) + "\n" for line in self._watched))
            self._write_alarms(loop.folder)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        with loop.ledger.stage("alarm"):
            means, spreads = self._scored(loop, report)
        diversity = report.metrics["diversity/l_gmd"]
        line = {"step": report.step, "trained": report.metrics["reward"], "diversity": diversity, "held_out": means, "spread": spreads}
        self._watched.append(line)
        if loop.folder is not None and loop.devices.rank == 0:
            with (loop.folder / WATCH).open("a") as file:
                file.write(json.dumps(line) + "\n")
        place = f"step {report.step + 1} of {report.total}"
        rung = [Alarm(report.step + 1, kind, f"{place}: {message}", self.action) for kind, message in self._seen(report).items()]
        if rung:
            self._ring(loop, rung, report.total)

    def _scored(self, loop: AlignmentLoop, report: Report) -> tuple[dict[str, float], dict[str, float]]:
        """Mean and standard deviation of each held-out reward on some of the step's samples, over all processes."""
        error: Exception | None = None
        sums = torch.zeros(len(self.rewards), 3, dtype=torch.float64)
        try:
            if self.rewards:
                sums = self._sums(loop, report)
        except Exception as caught:
            error = caught
        agree(loop.devices, error)
        count, total, squares = loop.devices.sum(sums).unbind(dim=1)
        mean = total / count.clamp(min=1)
        spread = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return dict(zip(self.rewards, mean.tolist(), strict=True)), dict(zip(self.rewards, spread.tolist(), strict=True))

    @torch.no_grad()
    def _sums(self, loop: AlignmentLoop, report: Report) -> Tensor:
        trajectories = report.batch.trajectories
        count = len(trajectories.leaves)
        index = torch.linspace(0, count - 1, min(self.images, count)).round().long().to(trajectories.latents.device)
        prompts = [trajectories.condition.prompts[i] for i in trajectories.group[index].tolist()]
        rows = []
        for start in range(0, len(index), loop.chunk):
            images = loop.objective.policy.decode(trajectories.samples[index[start : start + loop.chunk]])
            scores = score(self.rewards, images, prompts[start : start + loop.chunk])
            rows.append(torch.stack([torch.stack([s.new_tensor(float(len(s))), s.sum(), s.square().sum()]) for s in scores.values()]))
        return torch.stack(rows).double().sum(dim=0).cpu()

    def _seen(self, report: Report) -> dict[str, str]:
        """What is wrong at this step and was at the step before, by kind."""
        window = self._window(report.total)
        trained = moved([line["trained"] for line in self._watched], window)
        spread = moved([line["diversity"] for line in self._watched], window)
        if trained is None or spread is None:
            return {}
        found = {}
        for name in self.rewards:
            series = [line["held_out"][name] for line in self._watched if name in line["held_out"]]
            move = moved(series, window)
            if move is not None and trained.errors >= self.rise and self._fallen(move, name, window):
                found[name] = (
                    f"the trained reward {trained} while the held-out reward {name!r} {move}. The policy may be exploiting the reward: "
                    "look at its images, lower beta, or train on the held-out reward as well."
                )
        if spread.errors <= -self.threshold and spread.before - spread.now >= self.diversity_fall:
            found["diversity"] = (
                f"diversity (L-GMD) {spread} while the trained reward {trained}. The policy may be collapsing: look at its images, or "
                "lower beta."
            )
        self._streak = {kind: self._streak.get(kind, 0) + 1 for kind in found}
        lasting = {kind for kind, times in self._streak.items() if times >= _CONSECUTIVE}
        return {kind: text for kind, text in found.items() if kind in lasting and report.step >= self._quiet.get(kind, 0)}

    def _fallen(self, move: Move, name: str, window: int) -> bool:
        samples = [line["spread"][name] for line in self._watched if name in line["spread"]][:window]
        return move.errors <= -self.threshold and move.before - move.now >= self.fall * sum(samples) / len(samples)

    def _window(self, total: int) -> int:
        return self.window or max(5, total // 20)

    def _ring(self, loop: AlignmentLoop, rung: Sequence[Alarm], total: int) -> None:
        self.alarms.extend(rung)
        for alarm in rung:
            self._silence(alarm, total)
            if loop.devices.rank == 0:
                print(f"HACKING ALARM, {alarm.message}", file=sys.stderr, flush=True)
        if loop.folder is not None and loop.devices.rank == 0:
            self._write_alarms(loop.folder)
        if self.action == "temper":
            loop.aggregation = Tempered(loop.aggregation, self.factor)
        elif self.action == "stop":
            if threading.current_thread() is not threading.main_thread():
                raise Interrupted("HackingAlarm")  # where no signal can be waited for
            signal.raise_signal(signal.SIGINT)  # the loop stops once all hooks have seen this step

    def _silence(self, alarm: Alarm, total: int) -> None:
        self._quiet[alarm.kind] = alarm.step + 2 * self._window(total) if alarm.action == "temper" else float("inf")

    def _write_alarms(self, folder: Path) -> None:
        temporary = folder / f"{ALARMS}.tmp"
        temporary.write_text(json.dumps([attrs.asdict(alarm) for alarm in self.alarms], indent=1))
        temporary.replace(folder / ALARMS)
