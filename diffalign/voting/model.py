"""Model of votes: what a person would say of a picture, by what was said of others."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ..core import Prompt
from ..evaluation.features import Features, PixelFeatures


@attrs.frozen(eq=False)
class Looks:
    """Pictures as a model of votes sees them.

    Args:
        features: [K, D] float64, on the CPU
        prompts: K texts
    """

    features: Tensor
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, places: Sequence[int]) -> "Looks":
        return Looks(self.features[list(places)], [self.prompts[place] for place in places])

    @classmethod
    def none(cls, like: "Looks") -> "Looks":
        """No pictures, with features as others have them."""
        return cls(like.features[:0], [])

    def joined(self, other: "Looks") -> "Looks":
        """Join these pictures and, after them, the others."""
        return Looks(torch.cat([self.features, other.features]), [*self.prompts, *other.prompts])


@attrs.frozen(eq=False)
class Answers:
    """Answered questions.

    Args:
        weights: [Q, K], the sum of pictures that each question is about: 1 at its picture, or 1 and -1 at those of a pair
        values: [Q] in [-1, 1], from no to yes; the mean over people
        people: [Q], how many answered
    """

    weights: Tensor
    values: Tensor
    people: Tensor

    @classmethod
    def none(cls) -> "Answers":
        """No answers."""
        empty = torch.zeros(0, dtype=torch.float64)
        return cls(torch.zeros(0, 0, dtype=torch.float64), empty, empty)

    def joined(self, other: "Answers") -> "Answers":
        """Join these answers and, after them, the others, about pictures that are joined in the same order."""
        weights = torch.block_diag(self.weights, other.weights)
        return Answers(weights, torch.cat([self.values, other.values]), torch.cat([self.people, other.people]))


@attrs.frozen(eq=False)
class Belief:
    """Opinion of a model about some pictures.

    Args:
        mean: [K], from -1 (no) to 1 (yes)
        covariance: [K, K]
    """

    mean: Tensor
    covariance: Tensor

    @property
    def likes(self) -> Tensor:
        """Value of each picture in [0, 1]: [K]."""
        return (1 + self.mean.clamp(-1, 1)) / 2


@attrs.frozen
class VoteModel:
    """Gaussian process regression on the votes, in closed form.

        f ~ GP(m, k),   y_q = sum_k A_qk f(x_k) + noise / sqrt(people who answered q)
        k(x, x') = exp(-|x - x'|^2 / (2 l^2)) (1 if the prompts are equal, else share)

    x are features of a picture, l is `width` times the median distance of two pictures that were asked about, y_q is in [-1, 1], A_q picks
    the picture of the question, or the difference of a pair; m is the mean answer, 0 for pairs. Everything is computed in float64 on the
    CPU, in the order of the votes, so that equal votes give equal scores.

    Args:
        features: features by which pictures are compared
        width: width of the kernel
        noise: standard deviation of an answer of one person
        share: correlation of equal pictures of different prompts

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2.
    """

    features: Features = attrs.field(factory=lambda: PixelFeatures(8))
    width: float = attrs.field(default=0.7, validator=attrs.validators.gt(0.0))
    noise: float = attrs.field(default=0.5, validator=attrs.validators.gt(0.0))
    share: float = attrs.field(default=0.7, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])

    def look(self, images: Tensor, prompts: Sequence[Prompt]) -> Looks:
        """Take the features of images, rounded to float16 as votes files hold them."""
        return Looks(self.features(images).half().double().cpu().flatten(1), [str(prompt) for prompt in prompts])

    def belief(self, seen: Looks, answers: Answers, looks: Looks) -> Belief:
        """Believe something about some pictures, after some answers about others.

        Args:
            seen: pictures that were asked about
            answers: answers about them
            looks: the pictures of the belief

        Raises:
            ValueError: the features have another length than those of the pictures that were asked about.
        """
        if seen.features.shape[1] != looks.features.shape[1]:
            raise ValueError(
                f"votes were given on pictures with features of {seen.features.shape[1]} numbers; these pictures have "
                f"{looks.features.shape[1]}. Give the same features and image size, or another votes file."
            )
        length = self._length(seen if len(seen) > 1 else looks)
        within, prior = self._kernel(seen, seen, length), self._kernel(looks, looks, length)
        if not len(answers.values):
            return Belief(prior.new_zeros(len(looks)), prior)
        mean = answers.values.mean() * (answers.weights.sum(dim=1).abs() > 0).any()
        observed = answers.weights @ within @ answers.weights.T
        observed.diagonal().add_(self.noise**2 / answers.people)
        factor = torch.linalg.cholesky(observed)
        across = answers.weights @ self._kernel(seen, looks, length)
        missing = answers.values - mean * answers.weights.sum(dim=1)
        solved = torch.cholesky_solve(torch.stack([missing], dim=1), factor)
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        return Belief(mean + (across.T @ solved)[:, 0], prior - half.T @ half)

    def _length(self, looks: Looks) -> float:
        distances = torch.nn.functional.pdist(looks.features)
        median = float(distances[distances > 0].median()) if bool((distances > 0).any()) else 1.0
        return self.width * median

    def _kernel(self, one: Looks, other: Looks, length: float) -> Tensor:
        squares = torch.cdist(one.features, other.features, compute_mode="donot_use_mm_for_euclid_dist").square()
        number = {prompt: place for place, prompt in enumerate(dict.fromkeys([*one.prompts, *other.prompts]))}
        mine, its = (torch.tensor([number[prompt] for prompt in looks.prompts], dtype=torch.long) for looks in (one, other))
        return (-squares / (2 * length**2)).exp() * torch.where(mine[:, None] == its[None, :], 1.0, self.share)
