"""Reward in another process with another Python interpreter, for packages that conflict with the trainer's."""

import json
import math
import sys
import threading
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt, Reward, RewardError

from .memory import HalvedBatches
from .wire import WireError, plain_prompt, require_portable
from .worker_process import WorkerProcess


@attrs.define(eq=False)
class WorkerReward(Reward):
    """Runs a reward under another Python on this machine. That Python needs torch, but not this package.

    Images are sent as float32 through a pipe, without rounding, and prompts with their metadata as JSON. Nothing is pickled. The process
    starts when the reward is built, so that a missing package is known before training. If it crashes or is late, the call fails with
    the last lines that it printed, and the next call starts it again. When memory runs out, batches are halved.

    Args:
        reward: "module:name" of a function (images, prompts) -> [K], or of a class that is built with `arguments`. The module is searched
            in the working folder and among the packages of that Python
        python: the interpreter, such as "/opt/ocr/bin/python"; None takes this one
        arguments: arguments of the class, as JSON values
        device: device on which the reward gets the images
        timeout: seconds for one call
        start_timeout: seconds until the reward is built: imports and weights
        environment: variables beside those of this process, such as CUDA_VISIBLE_DEVICES. Set OMP_NUM_THREADS if the reward computes on
            the CPU and may use more threads than this process, or more than four beside an accelerator

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
    _process: WorkerProcess = attrs.field(init=False, repr=False)
    _halved: HalvedBatches = attrs.field(init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        module, colon, name = self.reward.partition(":")
        if not (module and colon and name):
            raise ValueError(f'WorkerReward.reward must be "module:name", the name of a function or class; got {self.reward!r}')
        try:
            arguments = json.dumps(dict(self.arguments), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"WorkerReward.arguments must be what JSON can hold: {error}") from error
        self._process = WorkerProcess(
            python=self.python or sys.executable,
            words=(self.reward, arguments, self.device),
            environment=dict(self.environment),
            start_timeout=self.start_timeout,
            timeout=self.timeout,
        )
        self._halved = HalvedBatches(self._scored)
        self._process.start()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) != len(prompts):
            raise RewardError(f"WorkerReward needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")
        with self._lock:
            return self._halved(images, prompts)

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata cannot be sent. The reward in the process checks its own needs when it is called.

        Raises:
            ConfigError: the metadata of a prompt cannot be sent; the message names the first such prompt and the reason.
        """
        require_portable(prompts, "WorkerReward")

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._process.stop()

    def _scored(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        try:
            texts = [plain_prompt(prompt) for prompt in prompts]
        except WireError as error:
            raise RewardError(f"WorkerReward: {error}") from error
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        scores = self._process.ask({"shape": list(pixels.shape), "prompts": texts}, pixels.numpy())
        if len(scores) != len(images):
            raise RewardError(f"WorkerReward: {self.reward} returned {len(scores)} scores for {len(images)} images; it must be one each")
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                where = f"image {place} of {len(images)}, prompt {str(prompts[place])!r}"
                raise RewardError(f"WorkerReward: {self.reward} returned {score} for {where}")
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
