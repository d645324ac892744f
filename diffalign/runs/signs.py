"""Signs that a run fails to learn, printed while it runs."""

from collections.abc import Iterator

import attrs

from ..core import AlignmentLoop, Hook, Report, RewardFunction
from ..core.report import is_even
from ..core.scores import weighed
from ..core.scoring import OfSources
from ..core.unessential import say

PATIENCE = 10
"""Number of successive steps without spread, or without a score."""

FAR = 100.0
"""Log-ratio in nats below which a run is never called exploded."""

TIMES = 3.0
"""Factor by which the size of finished latents may change."""


@attrs.define(eq=False)
class Signs(Hook):
    """Watches every step for five signs, and says each once, on stderr, with its likely cause.

    no spread   reward/group_std is 0, up to rounding, for 10 steps in a row; one sample a prompt has none
    no score    no reward with a weight applies to any picture for 10 steps in a row; steps whose prompts have no reward do not count
    silent      one reward applies to no picture for 10 steps in a row; said once of each that "no score" does not name
    exploded    |log_ratio/reference| or kl is above 100 + 10 target/spread nats: far more than the rewards ask for
    destroyed   the root mean square of the finished latents is 3 times, or a third of, that of the first step that was seen
    """

    _flat: int = attrs.field(default=0, init=False)
    _blank: int = attrs.field(default=0, init=False)
    _silent: dict[str, int] = attrs.field(factory=dict, init=False)
    _size: float | None = attrs.field(default=None, init=False)
    _said: set[str] = attrs.field(factory=set, init=False)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._flat, self._blank, self._silent, self._size, self._said = 0, 0, {}, None, set()

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        for sign, text in self._seen(loop, report):
            if sign not in self._said and loop.devices.rank == 0:
                say(f"step {report.step + 1}: {text}")
            self._said.add(sign)

    def _seen(self, loop: AlignmentLoop, report: Report) -> Iterator[tuple[str, str]]:
        metrics = report.metrics
        self._flat = self._flat + 1 if is_even(metrics) else 0
        self._blank = 0 if "reward" in metrics else self._blank + any(_asks(one, report) for one in _weighed(loop).values())
        for name, reward in loop.named_rewards().items():
            self._silent[name] = 0 if f"reward/{name}" in metrics else self._silent.get(name, 0) + _asks(reward, report)
        if self._flat >= PATIENCE:
            text = (
                f"for {self._flat} steps all samples of a prompt have had the same reward, so nothing is learned. The reward is coarse, "
                "the prompts are too easy or too hard for this model, or the samples are alike (a higher eta, more branches)."
            )
            yield "no spread", text
        if self._blank >= PATIENCE:
            text = (
                f"for {self._blank} steps no reward has applied to any picture, so none is learned from. Look at what "
                f"{', '.join(_weighed(loop))} asks of a prompt (metadata, a text in quotes), or give these prompts another reward; prompts "
                "that need none belong to a source with rewards: []."
            )
            yield "no score", text
        told = _weighed(loop) if self._blank >= PATIENCE else {}
        for name in [name for name, steps in self._silent.items() if steps >= PATIENCE and name not in told]:
            text = (
                f"for {self._silent[name]} steps the reward {name!r} has applied to no picture, so it counts for nothing. Look at "
                "what it asks of a prompt (metadata, a text in quotes) and of a picture (a limit that none reaches), or remove it."
            )
            yield f"silent {name}", text
        asked = metrics.get("target/spread", 0.0)
        far = next((name for name in ("log_ratio/reference", "kl") if abs(metrics.get(name, 0.0)) > FAR + 10 * asked), None)
        if far is not None:
            text = (
                f"{far} is {metrics[far]:.3g} nats, far more than the rewards ask for ({asked:.3g}). The learning rate is probably too "
                f"high{_rates(loop)}: take a tenth, and go on from an earlier checkpoint."
            )
            yield "exploded", text
        size = float(report.batch.trajectories.samples.detach().float().square().mean().sqrt())
        self._size = size if self._size is None else self._size
        if not self._size / TIMES <= size <= self._size * TIMES:
            text = (
                f"finished latents are {size / max(self._size, 1e-12):.2g} times as large as at first, which no picture is. The learning "
                f"rate has probably destroyed the model{_rates(loop)}: take a tenth, and begin again or go on from an earlier checkpoint."
            )
            yield "destroyed", text


def _weighed(loop: AlignmentLoop) -> dict[str, RewardFunction]:
    """Rewards that count, by name."""
    rewards = loop.named_rewards()
    return {name: rewards[name] for name in weighed(rewards, loop.aggregation.weights)}


def _asks(reward: RewardFunction, report: Report) -> bool:
    """True if a prompt of the step belongs to the reward."""
    return not isinstance(reward, OfSources) or any(map(reward.applies, report.batch.trajectories.condition.prompts))


def _rates(loop: AlignmentLoop) -> str:
    rates = sorted({group["lr"] for optimizer in loop.running.values() for group in optimizer.param_groups})
    return f" ({', '.join(f'{float(rate):g}' for rate in rates)})"
