"""Report of a step, and the metrics that it adds up."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, Evidence, NonFiniteError
from .groups import Raw, group_std, log_geometric_mean_distance
from .ledger import Ledger, peak_memory
from .processes import Devices, gather_texts
from .scores import Partial
from .types import Loss, Prompt, ScoredBatch

LOOP_NAMES = ("step", "elapsed", "reward", "lr_factor", "rows_per_second")
"""Names in the line of a step that the loop and its record write. No objective may report one of them."""

LOOP_BEGINNINGS = (
    *("reward/", "applies/", "diversity/", "source/", "grad_norm/", "loss_scale/", "contract/"),
    *("mfu/", "rows/", "calls/", "seconds/", "hidden/", "waits/", "memory/"),
)
"""Beginnings of further such names."""


@attrs.frozen(eq=False)
class Report:
    """Result of a step.

    Args:
        step: the number of this step, from 0
        total: steps of the run
        metrics: by name, means over samples and ranks; hooks may add numbers
        ledger: costs of this step: network rows and calls over all processes, the rest of this process
        batch: the scored trajectories of this process
        images: [n, 3, H, W] the first few pictures, on the CPU
        prompts: their n prompts
    """

    step: int
    total: int
    metrics: dict[str, float]
    ledger: Ledger
    batch: ScoredBatch
    images: Tensor
    prompts: tuple[Prompt, ...]


class Evaluated(Protocol):
    """Result of a hook that evaluates the weights, such as `diffalign.evaluation.Evaluation`."""

    @property
    def step(self) -> int:
        """Number of steps done."""
        ...

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Evaluated prompts, P of them, which are not trained on."""
        ...

    @property
    def rewards(self) -> Mapping[str, Tensor]:
        """Rewards by name, each [P, n]; the rewards of the run are among them."""
        ...

    @property
    def across(self) -> Mapping[str, float]:
        """Measures over all samples of all prompts."""
        ...

    @property
    def images(self) -> Tensor:
        """Images of the first few prompts, [p, n, 3, H, W] on the CPU."""
        ...

    @property
    def settings(self) -> Mapping[str, int]:
        """Settings that two evaluations must share to be compared prompt by prompt; the number of `samples` is among them."""
        ...

    @property
    def repeated(self) -> bool:
        """True if the run repeats this evaluation while it trains, so that its steps can be compared."""
        ...

    def measures(self) -> Mapping[str, Tensor]:
        """Measure rewards and diversity by prompt, each [P]: `reward NAME`, `diversity NAME`; `diversity l_gmd` is among them."""
        ...


@attrs.define
class Metrics:
    """Sums and counts by name."""

    sums: dict[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `total`, a sum over `count` items, to the sum of a name. Tensors stay on their device until all are read at once."""
        pair = (total.detach().double(), torch.as_tensor(count).double())
        old = self.sums.get(name)
        self.sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def take(self, loss: Loss, source: str) -> None:
        """Add the metrics of a loss.

        Args:
            loss: the loss
            source: name of what yielded it, for messages

        Raises:
            ValueError: a name is one of the loop's, whose own number would be lost or blended.
        """
        for name, (total, count) in loss.metrics.items():
            if name in LOOP_NAMES or name.startswith(LOOP_BEGINNINGS):
                raise ValueError(
                    f"{source} yielded a loss with the metric {name!r}, a name of the loop's own. To the loop belong "
                    f"{', '.join(LOOP_NAMES)}, and all that begins with {', '.join(LOOP_BEGINNINGS)}. Give the metric another name, such "
                    f"as 'mine/{name}'. Nothing was updated."
                )
            self.add(name, total, count)

    def ratios(self, found: Mapping[str, tuple[float, float]]) -> None:
        """Add numerators and denominators by name, as a `Meter` gives them."""
        for name, (total, count) in found.items():
            self.add(name, torch.tensor(total), torch.tensor(count))

    def describe(self, batch: ScoredBatch) -> None:
        """Add the raw rewards of a batch, their standard deviation within groups, and the diversity.

        If prompts come from several sources, add those of each source as well. A reward that applies to no sample has no entry. Samples to
        which no reward with a weight applies count neither in `reward` nor in `reward/group_std`, which have no entry where there are no
        others. Where each prompt has one sample there are no pairs, so neither the deviation within groups nor the diversity has an entry.
        `applies/NAME` is the share of samples that a reward applies to, of each source where there are several (`means` leaves out some).

        Args:
            batch: the scored batch
        """
        group, scored, prompts = batch.trajectories.group, batch.scored, batch.trajectories.condition.prompts
        sources = dict.fromkeys(prompt.source for prompt in prompts if prompt.source is not None)
        raw, std = _of_scored(batch)
        spread = log_geometric_mean_distance(batch.trajectories.samples, group)
        rewarded = batch.complete or bool(scored.any())
        paired = len(group) > len(batch.trajectories.condition)
        if rewarded:
            self.add("reward", raw.sum(), scored.sum())
        for name, part in batch.parts.parts.items():
            self._score(f"reward/{name}", part)
            if not sources:
                self._cover(f"applies/{name}", part, len(group))
        if rewarded and paired:
            self.add("reward/group_std", std.sum(), scored.sum())
        if paired:
            self.add("diversity/l_gmd", spread.sum(), len(spread))
        for source in sources:
            mine = torch.tensor([prompt.source == source for prompt in prompts])
            theirs = mine.to(group.device)[group]
            self.add(f"source/{source}/share", mine.sum(), len(mine))
            count = int((theirs & scored).sum())
            if count:
                self.add(f"source/{source}/reward", raw[theirs].sum(), count)
            for name in batch.parts:
                part = batch.parts.partial(name).where(theirs)
                self._score(f"reward/{name}/{source}", part)
                self._cover(f"applies/{name}/{source}", part, theirs.sum())
            if count and paired:
                self.add(f"reward/group_std/{source}", std[theirs].sum(), count)
            if paired:
                self.add(f"diversity/l_gmd/{source}", spread[mine.to(spread.device)].sum(), mine.sum())

    def _score(self, name: str, part: Tensor | Partial) -> None:
        """Add the mean of a reward over the samples that it applies to, if there are any."""
        values = part if isinstance(part, Tensor) else part.scores
        if len(values):
            self.add(name, values.sum(), len(values))

    def _cover(self, name: str, part: Tensor | Partial, count: Tensor | int) -> None:
        """Add the share of `count` samples that a reward applies to. Every process must, or the mean over all would be of some alone."""
        self.add(name, torch.tensor(float(len(part))) if isinstance(part, Tensor) else part.applies.sum(), count)

    def means(self, devices: Devices) -> dict[str, float]:
        """Mean of every name over all processes: sum / count. Names that only some processes have are included.

        `applies/NAME` is left out where it is 1, and `applies/NAME/SOURCE` where it is 0 as well, as for a reward of other sources.
        """
        names = list(self.sums)
        if devices.size > 1:
            names = list(dict.fromkeys(name for text in gather_texts(devices, "\n".join(names)) for name in text.splitlines()))
        nothing = (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
        numbers = on_host([number for name in names for number in self.sums.get(name, nothing)])
        table = devices.sum(numbers.view(-1, 2))
        result = {name: (row[0] / max(row[1], 1e-300)) for name, row in zip(names, table.tolist(), strict=True) if _told(name, *row)}
        return {**result, "memory/peak_bytes": float(devices.maximum(torch.tensor(float(peak_memory()), dtype=torch.float64)))}


def is_even(metrics: Mapping[str, float]) -> bool:
    """True if the samples of each prompt have equal rewards, up to their rounding. False where there is one sample of each.

    The limit is far below the spread from which `group_normalize` gives full advantages.
    """
    return metrics.get("reward/group_std", 1.0) <= 1e-6 * max(1.0, abs(metrics.get("reward", 0.0)))


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as numbers of Python; hooks may have added scalars of torch and numpy.

    Raises:
        ConfigError: one is something else.
    """
    numbers = {}
    for name, number in metrics.items():
        single = number.item() if isinstance(number, Tensor | np.generic | np.ndarray) and number.ndim == 0 else number
        if not isinstance(single, int | float):
            raise ConfigError(f"metric {name!r} must be one number; a hook wrote {type(number).__name__} {number!r}")
        numbers[name] = single
    return numbers


def _told(name: str, total: float, count: float) -> bool:
    """False for a share of samples with a score that says nothing."""
    return not name.startswith("applies/") or (total != count and (total != 0 or name.count("/") == 1))


def on_host(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars from several devices, copied to the CPU with one copy from each device: [n]."""
    result = torch.empty(len(numbers), dtype=torch.float64)
    for device in {number.device for number in numbers}:
        places = [place for place, number in enumerate(numbers) if number.device == device]
        result[places] = torch.stack([numbers[place].reshape(()) for place in places]).cpu().double()
    return result


def _of_scored(batch: ScoredBatch) -> tuple[Tensor, Tensor]:
    """Raw rewards of the scored samples, and their standard deviation within groups, 0 at the other samples: [K] each."""
    group = batch.trajectories.group
    raw = Raw(batch.weights)(batch.parts, group)
    if batch.complete:
        return raw, group_std(raw, group)
    index = batch.scored.nonzero().squeeze(1)
    zeros = torch.zeros_like(raw)
    return zeros.scatter(0, index, raw[index]), zeros.scatter(0, index, group_std(raw[index], group[index]))


def deviation(batch: ScoredBatch, devices: Devices) -> float:
    """Population standard deviation of the rewards of scored samples over all processes; 0 if there are none.

    Raises:
        NonFiniteError: such a reward is not finite, in this process or another. All processes raise it.
    """
    spread = _deviation(batch, devices)
    if not math.isfinite(spread):  # it has been waited for; looking at each reward in a good step would wait once more
        _require_finite_rewards(batch, devices)
    return spread


def _deviation(batch: ScoredBatch, devices: Devices) -> float:
    rewards = batch.rewards if batch.complete else batch.rewards[batch.scored]
    if devices.size == 1 and len(rewards):
        return float(rewards.double().std(unbiased=False))
    mine = rewards.detach().double().cpu()
    count, total = devices.sum(torch.stack([torch.tensor(float(len(mine)), dtype=torch.float64), mine.sum()]))
    mean, count = total / count.clamp(min=1), count.clamp(min=1)
    return float((devices.sum((mine - mean).square().sum()[None])[0] / count).sqrt())


def _require_finite_rewards(batch: ScoredBatch, devices: Devices) -> None:
    """Refuse aggregated rewards that are not finite. All processes call this together."""
    bad = (batch.scored & ~batch.rewards.isfinite()).nonzero().squeeze(1)
    if not devices.sum(torch.tensor([float(len(bad))], dtype=torch.float64)).item():  # only the squares are too large
        return
    found = "a number that is not finite in another process"
    if len(bad):
        first, condition = int(bad[0]), batch.trajectories.condition
        prompt = condition.prompts[int(batch.trajectories.group[first])]
        found = f"{batch.rewards[first].item()} for sample {first} of {len(batch.rewards)}, prompt {str(prompt)!r}"
    error = NonFiniteError(
        f"{batch.aggregation} must give finite rewards, and at step {batch.progress.step} it gave {found}. The scores that it was given "
        "are finite: look for a division by 0 or the logarithm of 0 in it. Nothing was updated."
    )
    error.evidence = Evidence.of(batch.progress.step, (), batch.trajectories, batch)
    raise error
