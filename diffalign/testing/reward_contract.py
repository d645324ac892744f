"""Contract of rewards, and measurements of a reward before it is trained on."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import attrs
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, RewardError, RewardFunction, score
from diffalign.core.scoring import require_order, reward_name

from .elsewhere import agrees, copied, on_a_second_device
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require


@attrs.frozen(eq=False)
class Scored:
    """Reward with images and prompts that it understands.

    Args:
        reward: the part
        images: [K, 3, H, W] in [0, 1]
        prompts: K prompts
    """

    reward: RewardFunction
    images: Tensor
    prompts: Sequence[Prompt]

    def scores(self, index: Sequence[int] | None = None) -> Partial:
        """Score the images, or those of some places, with the loop's own checks; say to which of them the reward applies."""
        places = list(range(len(self.images)) if index is None else index)
        images = self.images if index is None else self.images[places]
        return score({"reward": self.reward}, images, [self.prompts[place] for place in places]).partial("reward")


def _needs(scores: Partial, least: int) -> None:
    """Skip a property that needs more pictures with a score than there are."""
    count = len(scores.scores)
    if count < least:
        raise NotApplicableError(
            f"the reward applies to {count} of these {len(scores.applies)} pictures, and this needs {least}; give check_reward `images` "
            "and `prompts` to which it applies"
        )


def _equal(there: Partial, here: Partial, tolerance: float, rule: str, how: str) -> None:
    """Check that two calls apply to the same pictures, and that the scores there are equal.

    Args:
        there, here: the two results, in the same order of pictures
        tolerance: largest difference, relative to the largest score
        rule: beginning of the message, the rule that is checked
        how: words for the first call
    """
    apart = int((there.applies != here.applies).sum())
    holds(apart == 0, f"{rule}; {how} the reward applies to others: {apart} of {len(here.applies)} pictures differ")
    _needs(here, 1)
    gap, scale = float((there.scores - here.scores).abs().max()), float(here.scores.abs().max()) + 1e-6
    holds(gap <= tolerance * scale, f"{rule}; {how} it differs by {gap:.3g}")


def _shape(scored: Scored) -> None:
    holds(len(scored.scores().values) == len(scored.images), "it must return one number per image")
    holds(len(scored.scores([0]).values) == 1, "it must take a single image")


def _repeatable(scored: Scored) -> None:
    _equal(scored.scores(), scored.scores(), 0.0, "equal images must get equal scores", "in a second call")


def _order(scored: Scored) -> None:
    order = torch.randperm(len(scored.images), generator=torch.Generator().manual_seed(0))
    here, there = scored.scores(), scored.scores(order.tolist())
    moved = Partial(here.values[order], here.applies[order])
    _equal(there, moved, 1e-4, "an image's score must not depend on its place in the batch", "in another order")


def _chunks(scored: Scored) -> None:
    pieces = [scored.scores([place]) for place in range(len(scored.images))]
    alone = Partial(torch.cat([piece.values for piece in pieces]), torch.cat([piece.applies for piece in pieces]))
    _equal(alone, scored.scores(), 1e-3, "an image's score must not depend on the other images", "one by one")


def _leaves_images(scored: Scored) -> None:
    before = scored.images.clone()
    scored.scores()
    holds(torch.equal(before, scored.images), "it must not change the images: other rewards and the record see the same tensor")


def _distinguishes(scored: Scored) -> None:
    scores = scored.scores()
    _needs(scores, 2)
    values = scores.scores
    holds(float(values.std()) > 0, f"{len(values)} different images all get {float(values[0]):g}: it teaches nothing here")


def _second_device(scored: Scored) -> None:
    here = scored.scores()
    try:
        reward = copied(scored.reward)
    except NotApplicableError:  # it holds a process or a server, so the original is used and moved back afterwards
        reward = scored.reward
    try:
        there = score({"reward": reward}, scored.images.to(DEVICE), scored.prompts).partial("reward")
    finally:
        with suppress(RewardError):  # tensors that it shares with its copy have moved with the images; move them back
            score({"reward": reward}, scored.images, scored.prompts)
    agrees(there.applies.float(), here.applies.float(), "where the reward applies there", 0.0)
    _needs(here, 1)
    agrees(there.scores, here.scores, "the scores of images there", 1e-3)


REWARD: tuple[Property[Scored], ...] = (
    Property("one number per image", "the loop matches scores and images by place", _shape),
    Property("repeatable", "noise in the score is noise in the gradient", _repeatable),
    Property("order of images", "scores would be given to the wrong images", _order),
    Property("images apart", "results would depend on chunks", _chunks),
    Property("images unchanged", "the next reward would score another picture", _leaves_images),
    Property("tells images apart", "a group without spread has no advantage", _distinguishes),
    on_a_second_device(_second_device),
)


def check_reward(
    reward: RewardFunction,
    prompts: Sequence[str] | None = None,
    images: Tensor | None = None,
    skip: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Check a reward.

    Args:
        reward: a `Reward` or a function
        prompts: K texts that it understands; `Prompt`s if it reads metadata; by default counting captions of ShapeWorld
        images: [K, 3, H, W] in [0, 1]; by default pictures of ShapeWorld and noise
        skip: property name -> why it need not hold

    Raises:
        PropertyError: a property does not hold; the message names each such property, its meaning, and what happened.
    """
    return require(reward_name(reward), examine(cases(reward, prompts, images), REWARD, skip))


def cases(reward: RewardFunction, prompts: Sequence[str] | None = None, images: Tensor | None = None) -> Scored:
    """Combine the reward with the given images and prompts, or with eight images of ShapeWorld, four of which fit their captions."""
    if images is None:
        images, captions = _pictures()
        prompts = captions if prompts is None else prompts
    if prompts is None:
        raise ValueError("check_reward needs `prompts` for the images given, one each")
    if len(prompts) != len(images):
        raise ValueError(f"check_reward needs as many prompts as images; got {len(prompts)} and {len(images)}")
    require_order(reward_name(reward), reward)
    return Scored(reward, images, [text if isinstance(text, Prompt) else Prompt(text) for text in prompts])


def _pictures() -> tuple[Tensor, list[str]]:
    import numpy as np

    from diffalign.shapeworld.grammar import parse
    from diffalign.shapeworld.render import draw

    random = np.random.default_rng(0)
    captions = ["three red circles", "one blue square", "five green crosses", "two purple triangles"]
    right = [draw(parse(caption), random) for caption in captions]
    wrong = right[1:] + right[:1]
    return torch.from_numpy(np.stack(right + wrong)).float(), captions * 2


@attrs.frozen
class Measured:
    """Statistics of a reward on some images, those to which it applies.

    Args:
        mean, std, low, high: mean, standard deviation, least and largest of its scores
        noise: standard deviation over repeated calls, mean over images
        seconds: per image, the median of the calls
        applies: share of the images to which the reward applies; with fewer than two of them there are no statistics, and mean, std, low,
            high and noise are NaN
    """

    mean: float
    std: float
    low: float
    high: float
    noise: float
    seconds: float
    applies: float = 1.0

    def __str__(self) -> str:
        seconds = f"{1000 * self.seconds:.1f} ms an image"
        share = "" if self.applies == 1 else f", applies to {self.applies:.0%} of the images"
        if math.isnan(self.std):
            return f"too few scores to measure{share}, {seconds}"
        signal = "no noise" if self.noise == 0 else f"noise {self.noise:.3g} ({self.noise / max(self.std, 1e-12):.0%} of the spread)"
        return f"scores {self.mean:.4g} +- {self.std:.3g} in [{self.low:.4g}, {self.high:.4g}], {signal}{share}, {seconds}"


def measure_reward(
    reward: RewardFunction, prompts: Sequence[str] | None = None, images: Tensor | None = None, repeats: int = 3
) -> Measured:
    """Measure scale, noise and speed of a reward before it is trained on.

    Args:
        reward: the part
        prompts, images: see `check_reward`
        repeats: number of calls
    """
    return measure(cases(reward, prompts, images), repeats)


def measure(scored: Scored, repeats: int = 3) -> Measured:
    """Measure scale, noise and speed of a reward on the given cases."""
    rows, seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        rows.append(scored.scores())
        seconds.append(time.perf_counter() - start)
    each = sorted(seconds)[len(seconds) // 2] / len(scored.images)
    applies = torch.stack([row.applies for row in rows]).all(dim=0)
    table = torch.stack([row.values for row in rows])[:, applies].double()
    values, share = table[0], float(applies.double().mean())
    if len(values) < 2:
        return Measured(math.nan, math.nan, math.nan, math.nan, math.nan, each, share)
    noise = float(table.std(dim=0).mean()) if repeats > 1 else 0.0
    return Measured(float(values.mean()), float(values.std()), float(values.min()), float(values.max()), noise, each, share)
