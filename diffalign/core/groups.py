"""Reductions within prompt groups, and the aggregation of several rewards.

Legend: K samples, G groups. `group` [K] holds the group index of each sample; groups need not be contiguous.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from .interfaces import Aggregation
from .scores import Partial, Scores


def _count(group: Tensor) -> int:
    """Number of groups: the highest index + 1. Waits for the device."""
    return int(group.max()) + 1 if len(group) else 0


def _reduce(values: Tensor, group: Tensor, how: str, count: int) -> Tensor:
    """Reduce each group, and repeat the result at each of its samples: [K] -> [K]."""
    return values.new_zeros(count).scatter_reduce(0, group, values, how, include_self=False)[group]


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sum of its group, at each sample: [K] -> [K]."""
    return _reduce(values, group, "sum", _count(group))


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean of its group, at each sample: [K] -> [K]."""
    return _reduce(values, group, "mean", _count(group))


def group_log_softmax(logits: Tensor, group: Tensor) -> Tensor:
    """Log softmax within each group: [K] -> [K]. Invariant to a shift of a group's logits."""
    count = _count(group)
    shifted = logits - _reduce(logits.detach(), group, "amax", count)
    return shifted - _reduce(shifted.exp(), group, "sum", count).log()


def _centred(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Values minus their group's mean, and the mean of the squares of that: [K] each. Equal values give exact zeros."""
    count = _count(group)
    highest = _reduce(values, group, "amax", count)
    # the rounded mean of equal numbers may differ from them
    middle = torch.where(highest == _reduce(values, group, "amin", count), highest, _reduce(values, group, "mean", count))
    centred = values - middle
    return centred, _reduce(centred.square(), group, "mean", count)


def group_std(values: Tensor, group: Tensor) -> Tensor:
    """Population standard deviation of its group, at each sample: [K] -> [K]. It is exactly 0 for equal values."""
    return _centred(values, group)[1].sqrt()


def group_normalize(values: Tensor, group: Tensor, floor: float = 1e-4) -> Tensor:
    """(x - mean) / max(std, floor) within each group: [K] -> [K]. Equal values give zeros."""
    centred, variance = _centred(values, group)
    return centred / variance.clamp(min=floor**2).sqrt()  # clamped below the root, whose gradient is infinite at 0


def filled(part: Partial, group: Tensor) -> Tensor:
    """A number for every sample, without favour: [K].

        R_i                                                    where the reward applies to sample i
        mean of R over the samples of i's group where it does  else
        0                                                      where it applies to none of the group

    So a sample to which a reward does not apply is neither better nor worse than its group for it.
    """
    values = torch.where(part.applies, part.values, torch.zeros_like(part.values))
    known = part.applies.to(values.dtype)
    mean = group_sum(values, group) / group_sum(known, group).clamp(min=1)
    return torch.where(part.applies, values, mean)


def _standardized(part: Tensor | Partial, group: Tensor, floor: float) -> Tensor:
    """`group_normalize` over the samples of each group that a reward applies to, 0 at the others: [K]."""
    if isinstance(part, Tensor):
        return group_normalize(part, group, floor)
    index = part.applies.nonzero().squeeze(1)
    return torch.zeros_like(part.values).scatter(0, index, group_normalize(part.values[index], group[index], floor))


def dense(parts: Mapping[str, Tensor], group: Tensor) -> dict[str, Tensor]:
    """Every reward as a number for every sample; see `filled`."""
    split = Scores.of(parts).parts
    return {name: part if isinstance(part, Tensor) else filled(part, group) for name, part in split.items()}


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> Tensor:
    """Weighted sum of rewards, sum_m w_m R_m: [K]. Rewards without a weight are left out; `weights` None weighs each 1.

    Raises:
        ValueError: a weight names a reward that does not exist.
    """
    names = list(parts) if weights is None else list(weights)
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"aggregation.weights names the reward {missing[0]!r}, but the rewards are {', '.join(parts)}")
    weight = dict.fromkeys(parts, 1.0) if weights is None else weights
    return torch.stack([weight[name] * parts[name] for name in names]).sum(dim=0)


def some_weights(aggregation: Aggregation, attribute: "attrs.Attribute[Any]", value: Mapping[str, float] | None) -> None:
    """Refuse weights that leave out every reward, by which nothing could be summed.

    Raises:
        ValueError: they are empty.
    """
    if value is not None and not value:
        raise ValueError(
            f"{type(aggregation).__name__}.{attribute.name} must name at least one reward, or be None, which weighs each 1; got {value}"
        )


@attrs.frozen
class Raw(Aggregation):
    """Weighted sum of raw rewards, sum_m w_m R_m, in the rewards' own units.

    A sample takes the sum over the rewards that apply to it. One to which a reward does not apply, though it does to others of its group,
    is given their mean of it; a reward that applies to none of a group adds nothing there.

    Args:
        weights: by reward name; None weighs each 1, rewards without a weight are logged but not trained on
    """

    weights: Mapping[str, float] | None = attrs.field(default=None, validator=some_weights)

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        return weighted_sum(dense(parts, group), self.weights)


@attrs.frozen
class StandardizedParts(Aggregation):
    """Weighted sum of standardised rewards, sum_m w_m z(R_m): each is standardised within its group. A constant reward adds nothing.

    Mean and deviation are those of the group's samples that the reward applies to; for the others z is 0, as for an average sample.
    The effective inverse temperature of an objective then is beta / std of the group.

    Args:
        weights: see `Raw`
        floor: least standard deviation
    """

    weights: Mapping[str, float] | None = attrs.field(default=None, validator=some_weights)
    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        split = Scores.of(parts).parts
        return weighted_sum({name: _standardized(part, group, self.floor) for name, part in split.items()}, self.weights)


@attrs.frozen
class StandardizedSum(Aggregation):
    """Standardised sum z(sum_m w_m R_m): the weighted sum of the rewards, as in `Raw`, is standardised within its group.

    Args:
        weights: see `Raw`
        floor: least standard deviation
    """

    weights: Mapping[str, float] | None = attrs.field(default=None, validator=some_weights)
    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        return group_normalize(weighted_sum(dense(parts, group), self.weights), group, self.floor)


def log_geometric_mean_distance(latents: Tensor, group: Tensor) -> Tensor:
    """L-GMD of each group: the mean over its pairs of ln max(||x_i - x_j|| / sqrt(D), 1e-8); 0 for a group of one.

    Args:
        latents: [K, *]
        group: [K]

    Returns:
        [G], float64. Larger is more diverse; a collapsed group goes to ln 1e-8 = -18.4.

    Reference: TMPO, arXiv:2605.10983 (there on autoencoder latents).
    """
    flat = latents.flatten(1).double()
    values = []
    for index in range(int(group.max()) + 1 if len(group) else 0):
        members = flat[group == index]
        distances = torch.nn.functional.pdist(members) / members.shape[1] ** 0.5
        values.append(distances.clamp(min=1e-8).log().mean() if len(members) > 1 else flat.new_zeros(()))
    return torch.stack(values) if values else flat.new_zeros(0)
