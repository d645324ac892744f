"""Memory of an update, by its rows."""

import math

import attrs
import torch

from ..core import AlignmentLoop, Guided, Listed, Policy, Prompt, Size
from ..core.wrapper import PolicyAround
from .rows import Counted
from .sizes import activation_bytes


@attrs.frozen(eq=False)
class Activations:
    """Bytes that an update takes beside weights, gradients and optimizer: fixed + per_row * rows.

    Args:
        fixed: bytes whatever the rows
        per_row: bytes for each row
        size: image size for which they hold; None for the policy's own
        counted: calls of the policy at that size; None if it cannot be counted, and `per_row` is a guess
        reason: error of the count, if it could not be counted
    """

    fixed: int
    per_row: int
    size: Size | None
    counted: Counted | None
    reason: str = ""

    @classmethod
    def of(cls, loop: AlignmentLoop) -> "Activations":
        """Count a forward and a backward pass on the meta device, at the largest image size that a prompt asks for.

        Where they cannot be counted (quantised or sharded weights, a network that does not run without numbers), the inputs of the linear
        layers are a guess, without activation checkpointing.

        Args:
            loop: the built loop
        """
        policy = loop.objective.policy
        views = {size: policy.sized(size) for size in _sizes(loop)}
        size = max(views, key=lambda asked: math.prod(views[asked].latent_shape))
        calls = evaluations(policy)
        try:
            counted = counted_of(loop, views[size])
            one, two = counted.peak(1), counted.peak(2)
        except Exception as error:  # a network of the user's own that does not run without numbers fails in any way
            return cls(0, activation_bytes(views[size]), size, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
        return cls(max(2 * one - two, 0), calls * (two - one), size, counted)

    def at(self, rows: int) -> int:
        """Bytes of an update of that many rows at a time."""
        return self.fixed + self.per_row * rows if rows else 0

    def fitting(self, room: float) -> int:
        """Largest number of rows whose update takes at most `room` bytes; 0 if none."""
        return max(int((room - self.fixed) // self.per_row), 0)

    @property
    def source(self) -> str:
        """Description of where the numbers come from, for a table."""
        if self.counted is not None:
            return "counted operator by operator"
        return f"a guess, the inputs of the linear layers, because they cannot be counted: {self.reason}"


def counted_of(loop: AlignmentLoop, policy: Policy) -> Counted:
    """Count the calls of a policy for the first prompt of the run."""
    prompts = loop.prompts.prompts if isinstance(loop.prompts, Listed) else loop.prompts.draw(0, 1)
    with torch.no_grad():
        return Counted.of(policy, policy.encode([Prompt.of(prompts[0])]))


def evaluations(policy: Policy) -> int:
    """Network rows for one row of the policy: two under guidance."""
    count = 1
    while isinstance(policy, PolicyAround):
        count *= 2 if isinstance(policy, Guided) and policy.scale != policy.no_guidance else 1
        policy = policy.policy
    return count


def _sizes(loop: AlignmentLoop) -> set[Size | None]:
    prompts = loop.prompts.prompts if isinstance(loop.prompts, Listed) else [""]
    return {Prompt.of(prompt).size for prompt in prompts}
