"""Several sources of prompts at once, each with its share and its rewards."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import attrs

from diffalign.core import ConfigError, Listed, Prompt, PromptSource, Size, Sourced, Stateful
from diffalign.core.given import prompts_of

_FINEST, _LONGEST = 1000, 100_000
"""Largest denominator of a share, and largest number of prompts until the order of sources repeats itself."""


@attrs.frozen
class Source:
    """Source of a `Mixture`.

    Args:
        prompts: source of its prompts, which must be able to list them, or a list of texts
        share: number of prompts that it gives, in proportion to the others
        rewards: names of the run's rewards that score its pictures; None takes all. [] takes none: its prompts are not rewarded, but what
            an objective holds beside the reward (distillation, a KL to the reference) is held for them, too
    """

    prompts: PromptSource = attrs.field(converter=prompts_of)
    share: float = attrs.field(default=1.0, validator=attrs.validators.gt(0.0))
    rewards: Sequence[str] | None = attrs.field(default=None)

    @rewards.validator
    def _some(self, attribute: "attrs.Attribute[Sequence[str] | None]", rewards: Sequence[str] | None) -> None:
        if rewards is not None and (isinstance(rewards, str) or len(set(rewards)) < len(rewards)):
            raise ValueError(f"Source.rewards must be a list of names of rewards, each once; got {rewards!r}")


@attrs.frozen
class Mixture:
    """Prompts of several sources in fixed shares, each scored by the rewards of its source.

        slots 0, 1, 2, ... of the run: slot n goes to the source s with the largest  share_s (n + 1) - (slots that s has had)

    with shares that sum to 1, the first source where several are equal. A step takes the next `count` slots; the k-th slot of a source gets
    that source's k-th prompt. So every stretch of the run has each source by its share to within a prompt or two, every prompt of a list
    comes before one comes again, and a step depends on its number alone: resume needs no state. Within a step prompts stand source
    by source, so that processes, which take every size-th prompt, get equally many of each to within one.

    Every prompt says its `source`. A reward scores the pictures of its sources alone, has no score for the others, and is asked about their
    prompts alone. All prompts must ask for one size, because a step may hold any of them.

    Args:
        sources: by name; a name may not hold "/" or blanks

    Raises:
        ValueError: no sources; a source that is a mixture itself, or does not list its prompts; shares that are no simple fractions.
        ConfigError: prompts of several sizes.
    """

    sources: Mapping[str, Source]
    _order: tuple[int, ...] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Mixture.sources must name at least one source; got none")
        for name, source in self.sources.items():
            if not name or "/" in name or any(letter.isspace() for letter in name):
                raise ValueError(f"Mixture.sources: a name must hold no blanks and no '/', because it ends names of metrics; got {name!r}")
            if isinstance(source.prompts, Sourced) or not isinstance(source.prompts, Listed):
                raise ValueError(
                    f"Mixture.sources.{name}.prompts must list its prompts and be no mixture itself; got {type(source.prompts).__name__}"
                )
        object.__setattr__(self, "_order", _order({name: source.share for name, source in self.sources.items()}))
        sizes: dict[Size | None, Prompt] = {}
        for prompt in self.prompts:
            sizes.setdefault(prompt.size, prompt)
        if len(sizes) > 1:
            one, other = list(sizes.values())[:2]
            raise ConfigError(
                f"Mixture.sources must ask for one size of pictures; {str(one)!r} of {one.source} asks for {_shown(one.size)} and "
                f"{str(other)!r} of {other.source} for {_shown(other.size)}. Train sizes in runs of their own."
            )

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts of all sources, source by source."""
        listed = ((name, source.prompts) for name, source in self.sources.items())
        return [_of(prompt, name) for name, prompts in listed if isinstance(prompts, Listed) for prompt in prompts.prompts]

    @property
    def rewarded(self) -> Mapping[str, Sequence[str] | None]:
        """Name of a source -> names of the rewards that score its images; None stands for all."""
        return {name: source.rewards for name, source in self.sources.items()}

    def draw(self, step: int, count: int) -> list[Prompt]:
        """Draw the `count` prompts of a step."""
        drawn: list[Prompt] = []
        for place, (name, source) in enumerate(self.sources.items()):
            turns = range(self._had(place, step * count), self._had(place, (step + 1) * count))
            drawn += [_of(source.prompts.draw(turn, 1)[0], name) for turn in turns]
        return drawn

    def state(self) -> Mapping[str, Any]:
        """State of each source that has one."""
        return {name: source.prompts.state() for name, source in self.sources.items() if isinstance(source.prompts, Stateful)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        for name, inner in state.items():
            prompts = self.sources[name].prompts
            if isinstance(prompts, Stateful):
                prompts.restore(inner)

    def _had(self, place: int, slots: int) -> int:
        """Count the slots of a source among the first `slots` of the run."""
        rounds, rest = divmod(slots, len(self._order))
        return rounds * self._order.count(place) + self._order[:rest].count(place)


def _of(prompt: Prompt | str, source: str) -> Prompt:
    plain = Prompt.of(prompt)
    return Prompt(str(plain), plain.metadata, source)


def _order(shares: Mapping[str, float]) -> tuple[int, ...]:
    """Compute the order of turns until it repeats itself: places of sources."""
    fractions = [Fraction(share).limit_denominator(_FINEST) for share in shares.values()]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    weights = [int(fraction * common) for fraction in fractions]
    weights = [weight // math.gcd(*weights) for weight in weights]
    if not all(weights) or sum(weights) > _LONGEST:
        given = ", ".join(f"{share:g}" for share in shares.values())
        raise ValueError(f"Mixture.sources: shares must be small whole numbers or simple fractions, such as 1, 2 and 0.5; got {given}")
    order: list[int] = []
    credit = [0] * len(weights)
    for _ in range(sum(weights)):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        turn = max(range(len(credit)), key=lambda place: (credit[place], -place))
        credit[turn] -= sum(weights)
        order.append(turn)
    return tuple(order)


def _shown(size: Size | None) -> str:
    return "the run's own" if size is None else f"{size[0]} x {size[1]}"
