"""Measures that studies report: shares of the digits, effective number of classes, distance to real images and to the exact optimum."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .classes import CLASSES, classes_of
from .handwriting import split
from .judge import look
from .reading import latents_of


def class_shares(images: Tensor) -> Tensor:
    """Share of each digit among all images, counting only images of which the judge is sure. The rest to 1 is the share without a digit.

    Args:
        images: [K, 3, H, W] in [0, 1], K >= 1

    Returns:
        float64 [10], on the CPU, with a sum of at most 1.

    Raises:
        ValueError: no images, or others, as in `ink_of`.
    """
    _require_some(images)
    sight = look(images)
    return torch.bincount(sight.classes[sight.sure], minlength=len(CLASSES)).double() / len(images)


def effective_classes(shares: Tensor, classes: Iterable[int] = CLASSES) -> float:
    """Effective number of classes: exp(entropy) of the shares within `classes`, scaled to the sum 1. From 1 to the number of classes.

    It is 0 if all shares are 0.

    Args:
        shares: [10], not negative
        classes: digits that count, for instance those that are rewarded

    Raises:
        ValueError: the shares have another shape or are below 0, or `classes` holds other digits.
    """
    within = _judged(shares, "shares")[list(classes_of(classes))]
    if float(within.sum()) == 0:
        return 0.0
    within = within / within.sum()
    return math.exp(-float(torch.special.xlogy(within, within).sum()))


def distance_to_real(images: Tensor) -> float:
    """Mean Euclidean distance of the images to the nearest of the 1,437 real training images, in [-1, 1]^64.

    For comparison, the model card gives this distance for the 360 real images that are held out.

    Raises:
        ValueError: no images, or others, as in `ink_of`.
    """
    return float(distances_to_real(images).mean())


def distances_to_real(images: Tensor) -> Tensor:
    """Distance of each image [K] to the nearest of the 1,437 real training images; see `distance_to_real`.

    Raises:
        ValueError: no images, or others, as in `ink_of`.
    """
    _require_some(images)
    return torch.cdist(latents_of(images), split()[0].latents.flatten(1)).amin(dim=1)


def tilt(p0: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Optimum for a reward that depends only on the digit: p_k = p0_k exp(beta R_k) / Z.

    Args:
        p0: the base's shares [10], not negative, of any sum above 0
        reward: R of each digit [10]
        beta: nats per unit of reward

    Returns:
        float64 [10] with the sum 1; 0 where p0 is 0.

    Raises:
        ValueError: a shape is wrong, or shares are below 0 or all 0.
    """
    base = _judged(p0, "p0")
    if reward.shape != base.shape or float(base.sum()) == 0:
        raise ValueError(f"tilt needs some share above 0 and a reward of each digit, [10]; got p0 {p0.tolist()}, reward {reward.tolist()}")
    return torch.softmax(base.log() + beta * reward.double().cpu(), dim=0)


def kl(target: Tensor, shares: Tensor, floor: float = 1e-3) -> float:
    """Divergence KL(target || shares) = sum_k t_k ln(t_k / s_k), in nats, with both scaled to the sum 1.

    A digit that was never drawn gets the share `floor`, and then all are scaled to the sum 1 again. So a missing digit costs much, but not
    infinitely much. With 1,000 images, 1e-3 is the share of a single image.

    Args:
        target, shares: [10], not negative, of any sum above 0
        floor: least share

    Raises:
        ValueError: a shape is wrong, shares are below 0 or all 0, or the floor is outside (0, 0.1).
    """
    wanted, found = _judged(target, "target"), _judged(shares, "shares")
    if not 0 < floor < 0.1 or min(float(wanted.sum()), float(found.sum())) == 0:
        raise ValueError(
            f"kl needs a floor in (0, 0.1), and some share above 0 in both; got floor {floor}, target {target.tolist()}, shares "
            f"{shares.tolist()}"
        )
    wanted, found = wanted / wanted.sum(), (found / found.sum()).clamp(min=floor)
    return float((torch.special.xlogy(wanted, wanted) - wanted * (found / found.sum()).log()).sum())


def _judged(shares: Tensor, name: str) -> Tensor:
    if shares.shape != (len(CLASSES),) or not bool((shares >= 0).all()):
        raise ValueError(f"{name} must be 10 numbers of at least 0, one for each digit; got {shares.tolist()}")
    return shares.double().cpu()


def _require_some(images: Tensor) -> None:
    if len(images) == 0:
        raise ValueError("a measure needs at least one image; got none")
