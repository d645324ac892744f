"""Memory of the rows of a policy with gradient, by their number."""

import collections
import math

import attrs
import torch

from ..core import AlignmentLoop, Listed, Policy, Prompt, Size
from ..core.guided import evaluations
from .rows import Counted, Line
from .sizes import activation_bytes

_WORDS = {2: "two", 4: "four"}


@attrs.frozen(eq=False)
class Activations:
    """Bytes that an update takes beside weights, gradients and optimizer: of a call that was counted, or per_row * rows.

    Args:
        per_row: guess of the bytes for each network row; 0 if they are not known, or were counted
        size: image size for which they hold; None for the policy's own
        counted: calls of the policy at that size; None if it cannot be counted, and `per_row` is a guess
        reason: error of the count, if it could not be counted
        calls: network rows for each row: two under guidance
    """

    per_row: int
    size: Size | None
    counted: Counted | None
    reason: str = ""
    calls: int = 1

    @classmethod
    def of(cls, loop: AlignmentLoop) -> "Activations":
        """Count a forward and a backward pass on the meta device, for the longest prompt and the largest image size that one asks for.

        Where they cannot be counted (quantised or sharded weights, a network that does not run without numbers), the inputs of the linear
        layers are a guess, without activation checkpointing.

        Args:
            loop: the built loop
        """
        policy = loop.objective.policy
        size, calls = largest_size(loop, policy), evaluations(policy)
        view = policy.sized(size)
        try:
            counted = counted_of(loop, view)
            counted.lines()
        except Exception as error:  # a network of the user's own that does not run without numbers fails in any way
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            return cls(activation_bytes(view), size, None, reason, calls)
        return cls(0, size, counted, calls=calls)

    @property
    def known(self) -> bool:
        """True if the bytes were counted or guessed."""
        return self.counted is not None or self.per_row > 0

    def at(self, rows: int) -> int:
        """Bytes of an update of that many rows at a time."""
        if not rows:
            return 0
        return self.per_row * self.calls * rows if self.counted is None else self.counted.peak(self.calls * rows)

    def fitting(self, room: float) -> int:
        """Largest number of rows whose update takes at most `room` bytes; 0 if none."""
        lines = (Line(0, self.per_row),) if self.counted is None else self.counted.lines()
        return max(int(min((room - line.fixed) // (self.calls * line.per_row) for line in lines if line.per_row > 0)), 0)

    @property
    def each(self) -> str:
        """Description of a row that is several network rows, for a table, to be put after the word "rows"."""
        return "" if self.calls == 1 else f" (each {_WORDS.get(self.calls, self.calls)} network rows)"

    @property
    def source(self) -> str:
        """Description of where the numbers come from, for a table."""
        if self.counted is not None:
            return "counted operator by operator"
        return f"a guess, the inputs of the linear layers, because they cannot be counted: {self.reason}"


def counted_of(loop: AlignmentLoop, policy: Policy) -> Counted:
    """Count the calls of a policy for the longest prompt of the run, in bytes: a network may do and keep more for more text."""
    prompts = loop.prompts.prompts if isinstance(loop.prompts, Listed) else loop.prompts.draw(0, 1)
    longest = max(prompts, key=lambda text: (len(text.encode()), text))  # of several the same one, whatever their order
    with torch.no_grad():
        return Counted.of(policy, policy.encode([Prompt.of(longest)]))


def counted_by_size(loop: AlignmentLoop, policy: Policy, known: Activations | None = None) -> dict[Size | None, tuple[float, Counted]]:
    """Count the calls of a policy at each image size that prompts ask for, each with its share of the prompts.

    Args:
        loop: the built loop
        policy: policy at its own size
        known: calls of the same policy that were counted before, at one of the sizes
    """
    done = {} if known is None or known.counted is None else {known.size: known.counted}
    return {size: (share, done.get(size) or counted_of(loop, policy.sized(size))) for size, share in sizes_of(loop).items()}


def sizes_of(loop: AlignmentLoop) -> dict[Size | None, float]:
    """Image sizes that the prompts of the run ask for, each with its share of the prompts. A step has one size.

    If the source does not list its prompts, the policy's own size is assumed.
    """
    prompts = loop.prompts.prompts if isinstance(loop.prompts, Listed) else [""]
    sizes = collections.Counter(Prompt.of(prompt).size for prompt in prompts)
    return {asked: count / sizes.total() for asked, count in sizes.items()}


def largest_size(loop: AlignmentLoop, policy: Policy) -> Size | None:
    """Find the largest image size that a prompt of the run asks for; None is the policy's own."""
    return max(sizes_of(loop), key=lambda asked: math.prod(policy.sized(asked).latent_shape))
