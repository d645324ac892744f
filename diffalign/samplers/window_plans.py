"""Plans whose stochastic steps are a short window that moves: MixGRPO."""

import attrs

from diffalign.core import Progress, Streams
from diffalign.core.number_fields import finite, whole

from .plans import Branching, Plan


@attrs.frozen
class SlidingWindow(Plan):
    """Stochastic in `width` neighbouring steps; the window moves on in the course of the run, from noise to data, and begins again.

        window at step n of the run: places w, ..., w + width - 1,   w = first + stride * (floor(n / every) mod count)

    with as many places as fit before the last step, which has no noise to give. All else is deterministic, so that an update replays
    `width` steps alone. The authors take a width of 4 of 25 steps, moved by 1 every 25 steps of the run (their windows shrink at the end of
    the grid; these stay whole).

    Args:
        width: stochastic steps
        samples: K finished samples of a prompt
        eta: noise level of these steps
        every: steps of the run that the window stays
        stride: denoising steps by which it moves
        first: first step of the first window; FlowSDE is singular at step 0
        shared_noise: all samples of a prompt begin with one noise and part where the window begins, as the authors have it; else each has
            its own

    Raises:
        ValueError: a window that does not fit the steps.

    Reference: MixGRPO, arXiv:2507.21802.
    """

    width: int = attrs.field(default=4, validator=whole(1))
    samples: int = attrs.field(default=12, validator=whole(2))
    eta: float = attrs.field(default=0.7, validator=finite(attrs.validators.gt(0.0)))
    every: int = attrs.field(default=25, validator=whole(1))
    stride: int = attrs.field(default=1, validator=whole(1))
    first: int = attrs.field(default=1, validator=whole(0))
    shared_noise: bool = True

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        last = _last("SlidingWindow", steps, self.first, self.width)
        places = range(self.first, last + 1, self.stride)
        return _window(steps, places[progress.step // self.every % len(places)], self.width, self.samples, self.eta, self.shared_noise)

    def largest_noise(self, steps: int) -> tuple[float, ...]:
        last = _last("SlidingWindow", steps, self.first, self.width)
        places = range(self.first, last + 1, self.stride)
        return tuple(self.eta if any(place <= step < place + self.width for place in places) else 0.0 for step in range(steps))


@attrs.frozen
class RandomWindow(Plan):
    """Stochastic in `width` neighbouring steps, at a place that is drawn anew at every step of the run, uniform and equal on all processes.

    Args:
        width, samples, eta, shared_noise: see `SlidingWindow`
        first: first step at which it may begin

    Raises:
        ValueError: a window that does not fit the steps.

    Reference: MixGRPO, arXiv:2507.21802 (its random strategy).
    """

    width: int = attrs.field(default=4, validator=whole(1))
    samples: int = attrs.field(default=12, validator=whole(2))
    eta: float = attrs.field(default=0.7, validator=finite(attrs.validators.gt(0.0)))
    first: int = attrs.field(default=1, validator=whole(0))
    shared_noise: bool = True

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        last = _last("RandomWindow", steps, self.first, self.width)
        place = int(streams.generator("plan").integers(self.first, last + 1))
        return _window(steps, place, self.width, self.samples, self.eta, self.shared_noise)

    def largest(self, steps: int) -> Branching:
        _last("RandomWindow", steps, self.first, self.width)
        return _window(steps, self.first, self.width, self.samples, self.eta, self.shared_noise)

    def largest_noise(self, steps: int) -> tuple[float, ...]:
        end = _last("RandomWindow", steps, self.first, self.width) + self.width
        return tuple(self.eta if self.first <= step < end else 0.0 for step in range(steps))


def _last(where: str, steps: int, first: int, width: int) -> int:
    """The last step at which a window may begin."""
    last = steps - 1 - width
    if last < first:
        raise ValueError(
            f"{where} must fit {steps} steps: {width} stochastic steps from step {first} on, before the last step (which ends at sigma 0, "
            f"where no noise is left), need at least {first + width + 1}"
        )
    return last


def _window(steps: int, place: int, width: int, samples: int, eta: float, shared: bool) -> Branching:
    children = [samples if shared and step == place else 1 for step in range(steps)]
    levels = [eta if place <= step < place + width else 0.0 for step in range(steps)]
    return Branching(tuple(children), tuple(levels), roots=1 if shared else samples)
