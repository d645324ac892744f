"""Handling of a full device: a reward gets smaller batches, and fails only at a single image."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardError, RewardFunction, Scores
from diffalign.core.demands import reach, require
from diffalign.core.nesting import require_single

_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")
"""Messages of allocators that raise a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RewardError):  # it was classified already, and its text may quote another error
        return False
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


@attrs.define(eq=False)
class HalvedBatches(Reward):
    """Wrapper that gives a reward its images in halves, quarters, ... when memory runs out, and remembers how many fit.

    Args:
        reward: a reward that scores each image on its own, so that batches do not change scores

    Raises:
        ValueError: the reward must see whole groups, or be told the step.
        RewardError: (in a call) memory runs out for a single image.
    """

    reward: RewardFunction
    _fits: int | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        require_single("HalvedBatches.reward", self.reward, "Put HalvedBatches inside it, around what takes the memory.")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        scores: list[Scores] = []
        start = 0
        while start < len(images):
            end = min(len(images), start + (self._fits or len(images)))
            piece = self._scored(images[start:end], prompts[start:end])
            if piece is None:
                self._fits = (end - start) // 2
                continue
            if not scores and end == len(images):
                return piece  # unchanged, because the caller checks its shape
            part = piece if isinstance(piece, Partial) else torch.as_tensor(piece)
            shape = tuple(part.values.shape if isinstance(part, Partial) else part.shape)
            if shape != (end - start,):
                raise RewardError(f"the shape for {end - start} images must be ({end - start},); got {shape}")
            scores.append(Scores({"": part}))
            start = end
        return Scores.joined(scores).parts[""] if scores else self.reward(images, prompts)

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the reward inside requires."""
        require([self.reward], prompts)

    def _scored(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial | None:
        """Score the images; None if memory ran out. The tensors of the failed call are free then."""
        try:
            return self.reward(images, prompts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(images) == 1:
                size = f"{images.shape[-2]} x {images.shape[-1]}"
                raise RewardError(f"memory ran out for a single image of {size}: {error}") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
