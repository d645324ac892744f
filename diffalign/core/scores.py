"""Scores by reward name, of which some need not apply to every picture. Legend: K pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Partial:
    """Scores of a reward that does not apply to every picture; what a reward returns in place of a tensor.

    A picture to which a reward does not apply has no score. That is neither a zero, which would be learned from, nor a NaN, which is an
    error: its place in `values` is never read.

    Args:
        values: [K] numbers
        applies: [K] bool; false where there is no score

    Raises:
        ValueError: shapes that differ, or an `applies` that is not of type bool.
    """

    values: Tensor
    applies: Tensor

    def __attrs_post_init__(self) -> None:
        if self.values.shape != self.applies.shape or self.values.ndim != 1 or self.applies.dtype != torch.bool:
            raise ValueError(
                f"Partial needs values [K] and applies [K] of type bool; got shapes {tuple(self.values.shape)} and "
                f"{tuple(self.applies.shape)}, type {self.applies.dtype}"
            )

    @property
    def scores(self) -> Tensor:
        """The scores that there are, in order."""
        return self.values[self.applies]

    def where(self, chosen: Tensor) -> "Partial":
        """The same scores, applying to the chosen pictures alone: [K] bool."""
        return Partial(self.values, self.applies & chosen)

    def plain(self) -> "Tensor | Partial":
        """Return the values alone if the reward applies to every picture."""
        return self.values if bool(self.applies.all()) else self


class UnknownRewardError(KeyError, ValueError):
    """Error for a name that no reward has: a `KeyError`, as every mapping raises, that is shown as a sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


@attrs.frozen(eq=False)
class Scores(Mapping[str, Tensor]):
    """Raw scores of some pictures by reward name: a mapping to tensors [K].

    `scores[name]` is refused where the reward does not apply to all pictures, so that no number is made up in silence; `partial(name)`
    says which it applies to.

    Args:
        parts: by reward name, a tensor [K] where the reward applies to all
    """

    parts: Mapping[str, Tensor | Partial]

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """Scores as they are, or tensors by name as scores that apply to all pictures."""
        return parts if isinstance(parts, cls) else cls(parts)

    @classmethod
    def joined(cls, pieces: Sequence[Mapping[str, Tensor]]) -> Self:
        """The scores of consecutive pictures as those of all.

        Args:
            pieces: at least one, of the same rewards
        """
        split = [cls.of(piece) for piece in pieces]
        return cls({name: _joined([piece.parts[name] for piece in split]) for name in split[0]})

    def __getitem__(self, name: str) -> Tensor:
        part = self._part(name)
        if isinstance(part, Tensor):
            return part
        if not bool(part.applies.all()):
            raise ValueError(
                f"the reward {name!r} applies to {int(part.applies.sum())} of {len(part.applies)} pictures; what reads it must say what "
                f"becomes of the others: take `Scores.of(parts).partial({name!r})`"
            )
        return part.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def complete(self) -> bool:
        """True if some reward applies to all pictures, or there are no rewards: then every picture counts, and the device is not asked."""
        return not self.parts or any(isinstance(part, Tensor) for part in self.parts.values())

    def partial(self, name: str) -> Partial:
        """The scores of one reward, and where they apply."""
        part = self._part(name)
        return Partial(part, torch.ones_like(part, dtype=torch.bool)) if isinstance(part, Tensor) else part

    def _part(self, name: str) -> Tensor | Partial:
        if name not in self.parts:
            raise UnknownRewardError(
                f"scores must be asked for by the name of a reward, and the rewards are {', '.join(self.parts) or 'none'}; an aggregation "
                f"or objective asked for {name!r}"
            )
        return self.parts[name]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything as tensors, for files: PREFIX/NAME, and applies/NAME for a reward that does not apply to all (0 where it has none)."""
        plain: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            plain[f"{prefix}/{name}"] = part if isinstance(part, Tensor) else part.values
            if isinstance(part, Partial):
                plain[f"applies/{name}"] = part.applies
        return plain


def _joined(parts: Sequence[Tensor | Partial]) -> Tensor | Partial:
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    split = [Partial(part, torch.ones_like(part, dtype=torch.bool)) if isinstance(part, Tensor) else part for part in parts]
    return Partial(torch.cat([part.values for part in split]), torch.cat([part.applies for part in split]))


def weighed(names: Iterable[str], weights: Mapping[str, float] | None) -> list[str]:
    """Names of the rewards that count: those with a weight other than 0, or all if no weights are given. The others are only logged."""
    return [name for name in names if weights is None or weights.get(name, 0.0) != 0]
