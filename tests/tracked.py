"""A run of two steps with the trackers that the command line names; the folder is the first word."""

import sys
from pathlib import Path

from ring import ring_loop

from diffalign.core import Hook
from diffalign.runs.recording import Recorder
from diffalign.tracking import Trackers


class Last(Hook):
    """Says which trackers are left before they end; it comes before them."""

    def __init__(self, trackers):
        self.trackers = trackers

    def stop(self, loop, step, error):
        print("still there", *self.trackers._running)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    hook = Trackers(sys.argv[2:], project="rings", images_every=1, pictures=2)
    ring_loop(folder, [Last(hook), hook, Recorder(folder, "total: 2\nsampler: {steps: 4}\n", "ring")]).run(2)
