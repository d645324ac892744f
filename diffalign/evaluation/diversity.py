"""Measures of the diversity of a set of samples, from their features. Larger is more diverse.

Legend: n samples, D features, G sets of n samples each; a leading [G, ...] may be left out.
"""

import torch
from torch import Tensor


def unit_rows(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float64: [..., n, D] -> [..., n, D + 1].

    The last column is 1 for rows of zeros, which have no direction, else 0. So zero rows are equal to each other and orthogonal to others.

    Raises:
        ValueError: a feature is not finite.
    """
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite; some are not. Look at the images: a collapsed policy may give NaN.")
    rows = features.double()
    length = rows.norm(dim=-1, keepdim=True)
    empty = length == 0
    return torch.cat([rows / torch.where(empty, torch.ones_like(length), length), empty.double()], dim=-1)


def similarity(features: Tensor) -> Tensor:
    """Cosine similarity of all pairs: [..., n, D] -> [..., n, n], float64."""
    rows = unit_rows(features)
    return rows @ rows.transpose(-1, -2)


def cosine_distance(features: Tensor) -> Tensor:
    """Mean cosine distance 1 - cos(x_i, x_j) over the pairs i != j: [..., n, D] -> [...]; 0 for one sample.

    It is 0 if all are equal, 1 if all are orthogonal, and at most n / (n - 1).

    Reference: TMPO, arXiv:2605.10983, uses it with DINOv2 features.
    """
    count = features.shape[-2]
    if count < 2:
        return features.new_zeros(features.shape[:-2], dtype=torch.float64)
    cosines = similarity(features)
    off = cosines.sum(dim=(-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return 1 - off / (count * (count - 1))


def vendi_score(features: Tensor) -> Tensor:
    """Vendi score exp(-sum_i w_i ln w_i), w the eigenvalues of X X^T / n, X the rows scaled to length 1: [..., n, D] -> [...].

    It is the effective number of different samples: 1 if all are equal, n if all are orthogonal, 2 for two orthogonal clusters of equal
    size.

    Reference: Friedman and Dieng, arXiv:2210.02410.
    """
    rows = unit_rows(features)
    count = rows.shape[-2]
    # X X^T and X^T X have the same eigenvalues, except zeros, which contribute nothing
    wide = rows.shape[-1] >= count
    gram = rows @ rows.transpose(-1, -2) if wide else rows.transpose(-1, -2) @ rows
    return entropy_number(torch.linalg.eigvalsh(gram / count))


def entropy_number(shares: Tensor) -> Tensor:
    """Effective number exp(-sum_i w_i ln w_i) of shares that sum to 1, over the last dimension. Zeros (and negatives by rounding) add 0."""
    entropy: Tensor = torch.special.entr(shares.double().clamp(min=0)).sum(dim=-1)
    return entropy.exp()


def modes(features: Tensor, threshold: float = 0.9) -> Tensor:
    """Modes of a set of samples: single-linkage clusters of all pairs with a cosine similarity of at least `threshold`.

    Args:
        features: [n, D]
        threshold: in (-1, 1]

    Returns:
        [n], integers: the least index of a sample in the same mode.
    """
    linked = similarity(features) >= threshold - 1e-9  # equal rows may have a cosine of 1 - 1e-16
    label = torch.arange(len(features), device=features.device)
    while True:
        least = torch.where(linked, label, len(features)).amin(dim=1)
        if torch.equal(least, label):
            return label
        label = least


def effective_modes(labels: Tensor) -> Tensor:
    """Effective number of modes, exp(entropy) of the shares of the labels: [n] -> []. m labels of equal share give m."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return entropy_number(shares)


def cosine_distance_across(features: Tensor) -> Tensor:
    """Mean cosine distance 1 - cos over the pairs from different sets: [G, n, D] -> []; 0 for one set.

    It is small if every prompt gives the same image.
    """
    groups, count, _ = features.shape
    if groups < 2:
        return features.new_zeros((), dtype=torch.float64)
    sums = unit_rows(features).sum(dim=1)  # [G, D + 1]
    between = sums.sum(dim=0).square().sum() - sums.square().sum()
    return 1 - between / (groups * (groups - 1) * count**2)
