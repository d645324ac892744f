"""Reward in other processes: with another Python interpreter, for packages that conflict with the trainer's, or on several cores."""

import itertools
import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardError, Scores

from .memory import HalvedBatches
from .wire import WireError, plain_prompt, require_portable, reward_of
from .worker_process import WorkerProcess

Result = TypeVar("Result")


@attrs.define(eq=False)
class WorkerReward(Reward):
    """Runs a reward under another Python on this machine, in one process or in several. That Python needs torch, but not this package.

    Images are sent as float32 through a pipe, without rounding, and prompts with their metadata, source and size as JSON. Nothing is
    pickled. The process starts when the reward is built, so that a missing package is known before training. If it crashes or is late, the
    call fails with the last lines that it printed, and the next call starts it again. When memory runs out, batches are halved.

    A reward that does not apply to every image returns a `Partial` there, or without this package any object with its `values` and
    `applies`.

    With several workers the images of a call are dealt to them in as many consecutive parts of nearly equal size, which are scored at the
    same time; scores come back in the order of the images. A reward must score each image on its own, as a call may be cut anywhere. If a
    part fails, the others are waited for, and the first error is raised; only the processes that ended are started again. The cores bound
    the gain: each process computes on its share of them.

    Args:
        reward: "module:name" of a function (images, prompts) -> [K], or of a class that is built with `arguments`. The module is searched
            in the working folder and among the packages of that Python
        python: the interpreter, such as "/opt/ocr/bin/python"; None takes this one
        arguments: arguments of the class, as JSON values
        device: device on which the reward gets the images
        timeout: seconds for one call
        start_timeout: seconds until the reward is built: imports and weights
        environment: variables beside those of this process, such as CUDA_VISIBLE_DEVICES. Set OMP_NUM_THREADS if the reward computes on
            the CPU and may use more threads than this process, or more than four beside an accelerator; with several workers, if it may
            use more than its share
        workers: number of processes, each with a copy of the reward

    Raises:
        ValueError: `reward` has no colon, the interpreter does not exist, or `arguments` are not JSON values.
        RewardError: the reward cannot be built there, or (in a call) gives no scores; the message gives the reason.
    """

    reward: str
    python: str | None = None
    arguments: Mapping[str, object] = attrs.field(factory=dict)
    device: str = "cpu"
    timeout: float = attrs.field(default=300.0, validator=attrs.validators.gt(0.0))
    start_timeout: float = attrs.field(default=600.0, validator=attrs.validators.gt(0.0))
    environment: Mapping[str, str] = attrs.field(factory=dict)
    workers: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    _processes: tuple[WorkerProcess, ...] = attrs.field(init=False, repr=False)
    _halved: tuple[HalvedBatches, ...] = attrs.field(init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        module, colon, name = self.reward.partition(":")
        if not (module and colon and name):
            raise ValueError(f'WorkerReward.reward must be "module:name", the name of a function or class; got {self.reward!r}')
        try:
            arguments = json.dumps(dict(self.arguments), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"WorkerReward.arguments must be what JSON can hold: {error}") from error
        self._processes = tuple(
            WorkerProcess(
                python=self.python or sys.executable,
                words=(self.reward, arguments, self.device),
                environment=dict(self.environment),
                start_timeout=self.start_timeout,
                timeout=self.timeout,
                beside=self.workers - 1,
            )
            for _ in range(self.workers)
        )
        self._halved = tuple(HalvedBatches(partial(self._scored, process)) for process in self._processes)
        try:
            _together([process.start for process in self._processes])
        except BaseException:  # one may have started where another could not
            self.close()
            raise

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        if len(images) != len(prompts):
            raise RewardError(f"WorkerReward needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")
        if not len(images):
            return torch.zeros(0, device=images.device)
        count = min(self.workers, len(images))
        bounds = [len(images) * place // count for place in range(count + 1)]
        with self._lock:
            parts = _together(
                [
                    partial(self._halved[place], images[start:end], prompts[start:end])
                    for place, (start, end) in enumerate(itertools.pairwise(bounds))
                ]
            )
        return parts[0] if count == 1 else Scores.joined([Scores({"": part}) for part in parts]).parts[""]

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata cannot be sent. The reward in the process checks its own needs when it is called.

        Raises:
            ConfigError: the metadata of a prompt cannot be sent; the message names the first such prompt and the reason.
        """
        require_portable(prompts, "WorkerReward")

    def close(self) -> None:
        """End the processes; the next call starts others."""
        with self._lock:
            for process in self._processes:
                process.stop()

    def _scored(self, process: WorkerProcess, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        try:
            texts = [plain_prompt(prompt) for prompt in prompts]
        except WireError as error:
            raise RewardError(f"WorkerReward: {error}") from error
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        scores = process.ask({"shape": list(pixels.shape), "prompts": texts}, pixels.numpy())
        if len(scores) != len(images):
            raise RewardError(f"WorkerReward: {self.reward} returned {len(scores)} scores for {len(images)} images; it must be one each")
        for place, score in enumerate(scores):
            if score is not None and not math.isfinite(score):
                where = f"image {place} of {len(images)}, prompt {str(prompts[place])!r}"
                raise RewardError(f"WorkerReward: {self.reward} returned {score} for {where}")
        return reward_of(scores, images.device)


def _together(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of some tasks in their order, a thread for each; the first error, in that order, when all are done."""
    if len(tasks) == 1:
        return [tasks[0]()]
    with ThreadPoolExecutor(max_workers=len(tasks), thread_name_prefix="worker") as pool:
        futures = [pool.submit(task) for task in tasks]
    return [future.result() for future in futures]
