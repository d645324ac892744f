"""How much of what a device can do a run makes use of: model FLOP utilisation."""

import sys
from collections.abc import Collection, Mapping

import attrs
import torch

from ..core import AlignmentLoop, Ledger
from .cards import recognised

ROLLOUT, UPDATE = "mfu/rollout", "mfu/update"


@attrs.frozen
class Utilisation:
    """Gives `mfu/rollout` and `mfu/update` of a step.

        mfu = useful operations / (seconds of the stage x peak)

    Useful is a forward pass of each row of a policy that is not trained or has no gradient in the stage, and a forward and a backward pass
    of each row of a trained policy that carries one. A trained policy's rows without gradient in a stage where others carry one (which
    weigh the pieces of an update), and activations that are computed again, take time and count nothing.

    Args:
        forward: operations of a network row
        backward: of its backward pass
        peak: operations per second of a device

    Reference: Chowdhery et al., arXiv:2204.02311, appendix B.
    """

    forward: float
    backward: float
    peak: float

    def read(self, ledger: Ledger, trained: Collection[str]) -> Mapping[str, tuple[float, float]]:
        """Useful operations, and what the device could have done; stages without network rows have none."""
        result = {}
        for metric, stage in ((ROLLOUT, "rollout"), (UPDATE, "update")):
            entries = [entry for entry in ledger.rows if entry.endswith(f"/{stage}")]
            if entries:
                useful = sum(self._useful(ledger, entry, entry.rpartition("/")[0] in trained) for entry in entries)
                result[metric] = (useful, ledger.seconds[stage] * self.peak)
        return result

    def _useful(self, ledger: Ledger, entry: str, trained: bool) -> float:
        tracked = ledger.tracked[entry] if trained else 0
        return tracked * (self.forward + self.backward) if tracked else ledger.rows[entry] * self.forward


def meter_of(loop: AlignmentLoop, teraflops: float | None = None) -> Utilisation | None:
    """The meter of a run, for the card that it runs on.

    Args:
        loop: as built
        teraflops: what a device can do at most; without it, what is known of the GPU at hand

    Returns:
        None on a CPU or an unknown GPU without `teraflops`, and where a row cannot be counted, which is said once.
    """
    policy = loop.objective.policy
    peak = None if teraflops is None else teraflops * 1e12
    if peak is None and policy.device.type == "cuda":
        known = recognised(torch.cuda.get_device_name(policy.device))
        peak = None if known is None else known.peak(policy.precision)
    if peak is None:
        return None
    from .limits import counted_of  # slow to import, and seldom needed

    try:
        row = counted_of(loop, policy)(1)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # a network that does not run without numbers
        if loop.devices.rank == 0:
            print(f"mfu: the operations of {type(policy).__name__} are not counted: {error}", file=sys.stderr, flush=True)
        return None
    return Utilisation(row.forward.useful, row.backward.useful, peak)
