"""Batching: puts the images of several requests into one batch."""

import asyncio
import collections
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import attrs
import torch
from torch import Tensor

from ..core import Partial, Prompt, RewardFunction, score
from ..rewards.memory import HalvedBatches
from ..rewards.wire import plain_scores


@attrs.frozen(eq=False)
class _Job:
    """Images of one request, with the future that waits for their scores."""

    images: Tensor  # [K, 3, H, W] uint8
    prompts: tuple[Prompt, ...]  # K
    scores: asyncio.Future[list[float | None]]


@attrs.define(eq=False)
class Batcher:
    """Scores requests in order of arrival, one batch at a time, in one thread.

    A batch holds requests that arrived while the one before was scored: neighbours in the queue with images of the same size, up to
    `batch` images. A larger request is scored in pieces. If a batch of several requests fails, each request is scored again alone, so
    that only the request that caused the error gets it.

    Args:
        name: name of the reward in messages
        reward: reward that scores
        batch: largest number of images of a batch
        device: device of the images
        executor: executor with one thread
    """

    name: str
    reward: RewardFunction
    batch: int
    device: torch.device
    executor: Executor
    _halved: HalvedBatches = attrs.field(init=False)
    _waiting: collections.deque[_Job] = attrs.field(factory=collections.deque, init=False)
    _arrived: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    batches: int = attrs.field(default=0, init=False)
    images: int = attrs.field(default=0, init=False)
    _pace: float = attrs.field(default=0.0, init=False)  # seconds of an image, in the last batch
    _begun: int = attrs.field(default=0, init=False)  # images of the requests that are scored now

    def __attrs_post_init__(self) -> None:
        self._halved = HalvedBatches(self._on_device)

    @property
    def waiting(self) -> int:
        """Number of requests whose scoring has not begun."""
        return len(self._waiting)

    @property
    def seconds(self) -> float:
        """Seconds until all images that are here are scored, at the pace of the last batch; 0 before the first."""
        return self._pace * (self._begun + sum(len(job.images) for job in self._waiting))

    async def scored(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float | None]:
        """Wait for the scores of [K, 3, H, W] uint8 images, None where the reward does not apply.

        A caller that stops waiting leaves the queue.

        Raises:
            RewardError: the reward failed.
        """
        job = _Job(images, tuple(prompts), asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        try:
            return await job.scores
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self) -> None:
        """Score until cancelled."""
        while True:
            await self._arrived.wait()
            jobs = self._next()
            if not jobs:
                self._arrived.clear()
                continue
            self._begun = sum(len(job.images) for job in jobs)
            if len(jobs) == 1 or not await self._settled(jobs):
                for job in jobs:
                    await self._settled([job], alone=True)
            self._begun = 0

    def _next(self) -> list[_Job]:
        jobs: list[_Job] = []
        count = 0
        while self._waiting:
            job = self._waiting[0]
            if jobs and (job.images.shape[1:] != jobs[0].images.shape[1:] or count + len(job.images) > self.batch):
                break
            jobs.append(self._waiting.popleft())
            count += len(job.images)
        return jobs

    async def _settled(self, jobs: Sequence[_Job], alone: bool = False) -> bool:
        """Score some requests together. Returns True if they got scores or, for a single request (`alone`), an error."""
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self.executor, self._score, jobs)
        except Exception as error:  # any error goes to the requests that wait, and the next batch must still run
            if alone and not jobs[0].scores.done():
                jobs[0].scores.set_exception(error)
            return alone
        for job in jobs:
            if not job.scores.done():
                job.scores.set_result(scores[: len(job.images)])
            scores = scores[len(job.images) :]
        return True

    def _score(self, jobs: Sequence[_Job]) -> list[float | None]:
        images, prompts = torch.cat([job.images for job in jobs]), [prompt for job in jobs for prompt in job.prompts]
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch):
            end, began = start + self.batch, time.monotonic()
            scores += plain_scores(score({self.name: self._halved}, images[start:end], prompts[start:end]).parts[self.name])
            self.batches += 1
            self._pace = (time.monotonic() - began) / len(images[start:end])
        self.images += len(images)
        return scores

    def _on_device(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        return self.reward(images.to(self.device).float() / 255, prompts)
