"""Expected time of network calls: what kernels reach of a card's data sheet, fitted to measurements."""

import attrs
import torch

from ..core import Policy
from ..core.wrapper import PolicyAround
from ..policies import FlowMatchingPolicy
from .cards import Card
from .operators import ATTENTION, PRODUCT, Call, Operator

_HALF = (torch.bfloat16, torch.float16)


@attrs.frozen
class Reached:
    """Shares of a card's data sheet that kernels reach, and the seconds that each takes beside its work.

        operator = (max(operations / (share * peak), bytes / (share * bandwidth)) + kernel) * (1 or rest)
        call     = max(sum over its operators, host * number of its operators)

    The host starts operators while the device computes, so the slower of the two counts.

    Args:
        product: share of the peak of matrix products in half precision
        single: share of the peak of those in float32
        attention: share of the peak of attention in half precision
        half: share of the bandwidth of casts and elementwise operators whose results are in half precision; where operands are broadcast,
            torch's kernels load numbers one by one
        full: share of the bandwidth of all other operators
        kernel: seconds of an operator on the device beside its work
        host: seconds that the host needs to start an operator
        rest: share that a compiler leaves of the seconds of operators that are neither products nor attention
    """

    product: float
    single: float
    attention: float
    half: float
    full: float
    kernel: float
    host: float
    rest: float = 1.0

    def operator(self, operator: Operator, card: Card) -> float:
        """Expected seconds of one operator on the device."""
        half, computes = operator.dtype in _HALF, operator.kind in (PRODUCT, ATTENTION)
        share = self.attention if operator.kind == ATTENTION and half else self.product if half else self.single
        moved = self.half if half and not computes else self.full
        seconds = max(operator.operations / (share * card.peak(operator.dtype)), operator.moved / (moved * card.bandwidth)) + self.kernel
        return seconds * (1.0 if computes else self.rest)

    def call(self, call: Call, card: Card) -> float:
        """Expected seconds of a call."""
        return max(sum(self.operator(operator, card) for operator in call.operators), self.host * len(call.operators))


EAGER = Reached(product=0.87, single=1.0, attention=0.42, half=0.39, full=1.0, kernel=3.8e-6, host=18.8e-6)
"""Fitted to eleven calls of Stable Diffusion 3.5 Medium and FLUX.1-dev and the profile of one, on one H100 with torch 2.11. They describe
these calls together: a single number is no measurement of a kernel. `python -m benchmarks cost roofline --measured` compares."""

COMPILED = attrs.evolve(EAGER, rest=0.46, host=11.8e-6)
"""Blocks under torch.compile: `rest` is that of a forward pass of 27 rows of Stable Diffusion 3.5 Medium, `host` that of 3 rows."""


@attrs.frozen
class Manner:
    """Shares that the calls of a policy reach.

    Args:
        single: calls of one row without gradient, which `Compilation` leaves out
        several: calls of several rows without gradient
        tracked: calls with gradient
    """

    single: Reached = EAGER
    several: Reached = EAGER
    tracked: Reached = EAGER

    @classmethod
    def of(cls, policy: Policy) -> "Manner":
        """Find it by what the policy was built with. Recorded calls do not wait for the host."""
        while isinstance(policy, PolicyAround):
            policy = policy.policy
        if not isinstance(policy, FlowMatchingPolicy):
            return cls()
        compiled = EAGER if policy.compilation is None else COMPILED
        single = compiled if policy.compilation is not None and policy.compilation.every_call else EAGER
        found = (single, compiled, compiled)
        if policy.graphs is None:
            return cls(*found)
        recorded = (True, True, policy.graphs.gradients)
        return cls(*(attrs.evolve(each, host=0.0) if without else each for each, without in zip(found, recorded, strict=True)))

    def alone(self, rows: int) -> Reached:
        """Choose by the rows of a call without gradient."""
        return self.single if rows == 1 else self.several
