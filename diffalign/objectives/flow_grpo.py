"""Flow-GRPO on chains and BranchGRPO on trees: a policy gradient for each denoising step."""

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Loss, Objective, Outline, Phase, Policy, ScoredBatch, group_normalize
from diffalign.core.words import allowed_word

from .guards import KLMask
from .path_losses import PathLosses
from .paths import Center, Paths
from .ratio import Shift, shift_numbers
from .requirements import optional_reference, require_comparable, require_comparable_outline
from .terms import centered, clipped_surrogate

_FLOOR = 1e-4
"""Least standard deviation, as in `group_normalize`."""

Metrics = dict[str, tuple[Tensor, Tensor]]


@attrs.define(eq=False)
class FlowGRPO(Objective):
    """Group-relative policy optimisation: each stochastic step is an action, rewarded by the samples that came from it.

        A_i  = (R_i - mean R) / std R over the group;  A_e = mean of A_i over the leaves i below the edge e
        loss = mean over leaves of the sum over the stochastic edges e of their path of
               max(-A_e rho_e, -A_e clip(rho_e, 1 - clip, 1 + clip)) + kl KL_e,        rho_e = p_theta(e) / p_old(e)
        KL_e = KL(p_theta(e) || p_ref(e)), in closed form, in the convention of the log-density (per dimension with "mean")

    With `kl_in="reward"` there is no KL_e. Instead, R_i is replaced by R_i - kl (log p_old(tau_i) - log p_ref(tau_i)), in nats. If it is
    not standardised and kl = 1 / beta, the on-policy gradient is 1 / beta times that of the centred, relative `SoftmaxTB`.

    The sampler decides the method: `ChainSampler` gives Flow-GRPO (whose paper divides the loss by the number of steps), `TreeSampler` with
    a `SlidingWindow` or `RandomWindow` gives MixGRPO, and with another plan BranchGRPO. A step that all samples of a prompt share has no
    advantage.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. With kl 0 no reference is allowed
        kl: weight of the reference, >= 0, in units of the (standardised) advantage per nat. This unit holds for both values of `kl_in` and
            for every log-density, because KL_e and the ratio use the same one. 1 / kl corresponds to beta of `SoftmaxTB`: 0.05 means 20
            nats per standard deviation
        kl_in: see above
        standardize: divide the centred advantage by a standard deviation
        deviation: deviation that divides: of the rewards of the "group", or of all rewards of the step over all processes ("batch"),
            whatever their prompts, which keeps small differences small (the authors' `global_std`). The latter is that of R alone, without
            the reference
        clip: half width of the trust region of a step's ratio; None does not clip. The authors' release takes 1e-4 with density "mean"
        kl_mask: blocks the gradient of steps whose Gaussian has moved too far since the rollout, in place of the clip (Flow-DPPO); None
            leaves the clip. Its divergence is ||m - m_old||^2 / (2 n^2) per dimension, for every log-density. It matters from the second
            update on
        ratio_norm: normalise the log-ratio of each step as `RatioNorm` does, so that early and late steps are clipped alike (GRPO-Guard)
        level_weights: correct the gradient of edges that many leaves of a group share, which is too small (`Paths.level_weights`)
        updates: inner updates on the same trajectories
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: the reference is trainable, a group has one sample, the batch has no stochastic edges, there are several updates with
            a kernel of density "sum", or settings exclude each other.

    Reference: Flow-GRPO, arXiv:2505.05470; MixGRPO, arXiv:2507.21802; BranchGRPO, arXiv:2509.06040; GRPO-Guard, arXiv:2510.22319;
        Flow-DPPO, arXiv:2606.11025.
    """

    policy: Policy
    reference: Policy | None = None
    kl: float = 0.04
    kl_in: Literal["loss", "reward"] = attrs.field(default="loss", validator=allowed_word)
    standardize: bool = True
    deviation: Literal["group", "batch"] = attrs.field(default="group", validator=allowed_word)
    clip: float | None = attrs.field(default=1e-3, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    kl_mask: KLMask | None = None
    ratio_norm: bool = False
    level_weights: bool = False
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _replay: PathLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = optional_reference(self.policy, self.reference, self.kl, "FlowGRPO.kl")
        if not self.standardize and self.deviation != "group":
            raise ValueError(
                f"FlowGRPO.deviation has no use if FlowGRPO.standardize is false, where nothing is divided; got {self.deviation!r}. Leave "
                "it out, or set standardize to true."
            )
        if self.updates > 1 and self.policy.kernel.density == "sum" and not self.ratio_norm:
            raise ValueError(
                f"FlowGRPO.updates must be 1 if the kernel's log-density is a 'sum'; got {self.updates}. One update moves a step by many "
                "nats, so every ratio would be clipped: take ratio_norm=True, or a kernel with density 'mean'."
            )
        numbers = shift_numbers if self.ratio_norm or self.kl_mask else None
        weighed: Center | None = "group" if self.level_weights else None
        self._replay = PathLosses(self.policy, self.reference, numbers, weighed, self.updates, self._divergence_in_loss)

    @property
    def _divergence_in_loss(self) -> bool:
        return self.reference is not None and self.kl_in == "loss"

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses, self.updates),)

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy} if self.reference is None else {"policy": self.policy, "reference": self.reference}

    def after_step(self) -> None:
        self._replay.forget()

    def require(self, outline: Outline) -> None:
        require_comparable_outline(outline, "FlowGRPO")

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_comparable(batch.trajectories, "FlowGRPO")
        yield from self._replay(batch, update, self.rows, self._loss)

    def _loss(self, paths: Paths) -> Loss:
        batch, group = paths.batch, paths.group
        trajectories, child = batch.trajectories, paths.edges.child
        count = torch.tensor(len(group))
        metrics: Metrics = {}
        rewards = batch.rewards.double()
        if paths.reference is not None:
            drift = paths.drift(paths.old)
            metrics["log_ratio/reference"] = (drift.sum(), count)
            if self.kl_in == "reward":
                rewards = rewards - self.kl * drift
        advantage = self._advantage(rewards, batch)
        log_ratio = self._log_ratio(paths)
        surrogate, blocked = self._surrogate(trajectories.node_mean(advantage)[child], log_ratio, paths)
        weight = paths.share()  # turns the mean over leaves of path sums into a sum over edges
        value = (weight * surrogate).sum() / batch.groups
        if self._divergence_in_loss:
            divergence = paths.numbers["kl"]
            value = value + self.kl * (weight * divergence).sum() / batch.groups
            metrics["kl"] = (paths.divergence().detach().sum(), count)
        ratio, edges = log_ratio.detach().exp(), torch.tensor(len(child))
        metrics |= {
            "loss": (value.detach() * batch.groups, torch.tensor(len(trajectories.condition))),
            "ratio/mean": (ratio.sum(), edges),
            "ratio/clipped": (blocked.double().sum(), edges),
            "advantage/std": (advantage.std() * count, count),
        }
        return Loss(value, metrics)

    def _advantage(self, rewards: Tensor, batch: ScoredBatch) -> Tensor:
        """[K] A of the rewards, from which the reference may have been taken."""
        group = batch.trajectories.group
        if self.standardize and self.deviation == "group":
            return group_normalize(rewards, group)
        if not self.standardize:
            return centered(rewards, group)
        spread = float(batch.rewards.double().std(unbiased=False)) if batch.deviation is None else batch.deviation
        return centered(rewards, group) / max(spread, _FLOOR)

    def _surrogate(self, advantage: Tensor, log_ratio: Tensor, paths: Paths) -> tuple[Tensor, Tensor]:
        """Surrogate of each step, and whether its trust region holds it: [E] each.

        Held are the steps whose gradient the mask blocks. Without a mask they are all those whose ratio is outside the clip range, of which
        some keep their gradient: those that would come back.
        """
        if self.kl_mask is None:
            outside = (log_ratio.detach().exp() - 1).abs() > (self.clip or float("inf"))
            return clipped_surrogate(advantage, log_ratio, self.clip), outside
        moved = paths.numbers["squares"].detach() / (2 * paths.numbers["std"].double().square())
        return self.kl_mask.surrogate(advantage, log_ratio, moved), self.kl_mask.blocked(advantage, log_ratio, moved)

    def _log_ratio(self, paths: Paths) -> Tensor:
        """Log-ratio of each step, with its gradient: [E]."""
        log_ratio = paths.log_prob - paths.old
        if not self.ratio_norm:
            return log_ratio
        size = paths.batch.trajectories.latents[0].numel()
        shift = Shift(paths.numbers["squares"], paths.numbers["std"], self.policy.kernel.density, size)
        return shift.normalized(log_ratio)
