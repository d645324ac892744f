"""Scoring in the background, while the next prompts are rolled out."""

import time
from collections import deque
from concurrent.futures import Future, wait
from threading import Thread

import attrs
import torch

from .rollout import Pictures, Rollout, Stages, pieces
from .scores import Scores
from .types import Condition, TrajectoryBatch

Running = deque["Future[tuple[Scores, float]]"]


@attrs.frozen
class Overlapped(Rollout):
    """Scores images in a thread while the next prompts are sampled and decoded.

    It saves time if a reward waits for something that the rollout does not use: a server, another process, another device. The numbers
    equal those of `Sequential` with the same `prompts` in every bit. With another number of prompts the network calls have another size,
    and the last digits may differ.

    A reward is called from threads; with `workers` 1 from one at a time. At most `workers` + 1 chunks of images exist at once. An error
    of a reward is raised unchanged before the next prompts are sampled. Calls that still run are waited for, so that none outlives its
    step. The ledger charges the time that the step waited to the stage "reward"; the rest of the rewards' time is `hidden`.

    A `StepReward` scores all images of the step after the last prompts, so they are all kept until then, and nothing overlaps with it.

    Args:
        prompts: prompt groups that are sampled at once
        workers: chunks of images that are scored at the same time; above 1 only if several threads may call the reward
    """

    prompts: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    workers: int = attrs.field(default=1, validator=attrs.validators.ge(1))

    def __call__(self, condition: Condition, stages: Stages) -> tuple[TrajectoryBatch, Scores]:
        with stages.ledger.uncounted():
            return self._overlapping(condition, stages)

    def _overlapping(self, condition: Condition, stages: Stages) -> tuple[TrajectoryBatch, Scores]:
        forests: list[TrajectoryBatch] = []
        scores: list[Scores] = []
        running: Running = deque()
        try:
            for piece in pieces(condition, self.prompts):
                while running and running[0].done():
                    scores.append(_scores(running, stages))
                forests.append(stages.sample(piece))
                for pictures in stages.decode(forests[-1]):
                    while len(running) >= self.workers:
                        scores.append(_scores(running, stages))
                    running.append(_in_background(stages, pictures))
            while running:
                scores.append(_scores(running, stages))
        except Exception:  # not KeyboardInterrupt: Ctrl-C should not wait for a server
            wait(running)
            raise
        return stages.joined(condition, forests, scores)


def _scores(running: Running, stages: Stages) -> Scores:
    """Wait for the oldest call and return its scores."""
    begun = time.perf_counter()
    with stages.ledger.stage("reward"):
        scores, seconds = running.popleft().result()
    stages.ledger.hide("reward", max(0.0, seconds - (time.perf_counter() - begun)))
    return scores


def _in_background(stages: Stages, pictures: Pictures) -> "Future[tuple[Scores, float]]":
    """Start to score in a thread. It is a daemon thread: a process that is told to end does not wait for a server."""
    future: Future[tuple[Scores, float]] = Future()
    device = torch.accelerator.current_device_index() if pictures.images.device.type != "cpu" else None
    Thread(target=_score, args=(stages, pictures, future, device), name="reward", daemon=True).start()
    return future


def _score(stages: Stages, pictures: Pictures, future: "Future[tuple[Scores, float]] | None", device: int | None) -> None:
    assert future is not None
    begun = time.perf_counter()
    try:
        if device is not None:
            torch.accelerator.set_device_index(device)  # the current device is each thread's own
        scores = stages.score(pictures)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result((scores, time.perf_counter() - begun))
    finally:
        future = None  # the error, its frames and what they hold would keep each other alive
