"""Model FLOP utilisation: share of a device's peak that a run uses."""

from collections.abc import Collection, Mapping

import attrs
import torch

from ..core import AlignmentLoop, Ledger, Size
from ..core.unessential import say
from .cards import recognised

ROLLOUT, UPDATE = "mfu/rollout", "mfu/update"


@attrs.frozen
class Utilisation:
    """Computes `mfu/rollout` and `mfu/update` of a step.

        mfu = useful operations / (seconds of the stage x peak)

    A row of a rollout counts a forward pass. In the update, a policy that is not trained, or has no gradient there, counts a forward pass
    for each row. A trained policy counts a forward and a backward pass for each row that carries a gradient; its other rows (they weigh the
    pieces of an update) count nothing. A row whose graph the rollout kept (`keep_graph`) counts its backward pass in the update, where it
    is done. Activations that are computed again count nothing.

    Args:
        forward: operations of the forward pass of a network row; if prompts ask for several image sizes, the mean over the prompts
        backward: operations of its backward pass, likewise
        peak: operations per second of a device
        sizes: operations of both passes at each image size that prompts ask for; another size takes the mean

    Reference: Chowdhery et al., arXiv:2204.02311, appendix B.
    """

    forward: float
    backward: float
    peak: float
    sizes: Mapping[Size | None, tuple[float, float]] = attrs.field(factory=dict)

    def read(self, ledger: Ledger, trained: Collection[str], size: Size | None = None) -> Mapping[str, tuple[float, float]]:
        """Compute useful operations, and operations at the peak, of each stage that has network rows or goes back through kept graphs.

        Args:
            ledger: seconds and rows of the step in this process
            trained: roles of the ledger whose weights are trained
            size: image size that the prompts of the step ask for (`Condition.size`); None is the policy's own
        """
        forward, backward = self.sizes.get(size, (self.forward, self.backward))
        rolled, updated = ([entry for entry in ledger.rows if entry.endswith(f"/{stage}")] for stage in ("rollout", "update"))
        kept = sum(self._tracked(ledger, entry, trained) for entry in rolled)
        result = {}
        if rolled:
            useful = sum(ledger.rows[entry] for entry in rolled) * forward
            result[ROLLOUT] = (useful, ledger.seconds["rollout"] * self.peak)
        if updated or (kept and "update" in ledger.seconds):
            seen = sum(ledger.rows[entry] for entry in updated if not self._tracked(ledger, entry, trained))
            both = sum(self._tracked(ledger, entry, trained) for entry in updated)
            useful = seen * forward + both * (forward + backward) + kept * backward
            result[UPDATE] = (useful, ledger.seconds["update"] * self.peak)
        return result

    def _tracked(self, ledger: Ledger, entry: str, trained: Collection[str]) -> int:
        return ledger.tracked[entry] if entry.rpartition("/")[0] in trained else 0


def meter_of(loop: AlignmentLoop, teraflops: float | None = None) -> Utilisation | None:
    """Make the meter of a run, for the card on which it runs.

    A row is counted at each image size that prompts ask for, with the longest text.

    Args:
        loop: the built loop
        teraflops: peak of a device in TFLOP/s; None takes the peak of the GPU of the policy from the table

    Returns:
        None on a CPU or an unknown GPU without `teraflops`. None also if a row cannot be counted; a message says so once.
    """
    policy = loop.objective.policy
    peak = None if teraflops is None else teraflops * 1e12
    if peak is None and policy.device.type == "cuda":
        known = recognised(torch.cuda.get_device_name(policy.device))
        peak = None if known is None else known.peak(policy.precision)
    if peak is None:
        return None
    from .activations import counted_by_size  # slow to import, and seldom needed

    try:
        rows = {size: (share, calls(1)) for size, (share, calls) in counted_by_size(loop, policy).items()}
    except (ValueError, NotImplementedError, RuntimeError) as error:  # a network that does not run without numbers
        if loop.devices.rank == 0:
            say(f"mfu: the operations of {type(policy).__name__} are not counted: {error}")
        return None
    sizes = {size: (row.forward.useful, row.backward.useful) for size, (_, row) in rows.items()}
    forward, backward = (sum(share * sizes[size][way] for size, (share, _) in rows.items()) for way in (0, 1))
    return Utilisation(forward, backward, peak, sizes)
