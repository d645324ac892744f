"""Flow-GRPO on chains, and BranchGRPO on trees: policy gradients step by step."""

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Edges, Gaussian, Loss, Objective, Phase, Policy, ScoredBatch, TrajectoryBatch, group_normalize, replay_parents

from .paths import PathLosses, Paths
from .ratio import Shift, shift_numbers
from .requirements import optional_reference, require_comparable, require_finite
from .terms import centered, clipped_surrogate

Metrics = dict[str, tuple[Tensor, Tensor]]


@attrs.define(eq=False)
class FlowGRPO(Objective):
    """Group-relative policy optimisation: each stochastic step is an action, rewarded by the samples that came of it.

        A_i  = (R_i - mean R) / std R over the group;  A_e = mean of A_i over the leaves i below the edge e
        loss = mean over leaves of the sum over the stochastic edges e of their path of
               max(-A_e rho_e, -A_e clip(rho_e, 1 - clip, 1 + clip)) + kl KL_e,        rho_e = p_theta(e) / p_old(e)
        KL_e = KL(p_theta(e) || p_ref(e)), in closed form, in the units of the log-density (per dimension with "mean")

    With `kl_in="reward"` there is no KL_e; instead R_i - kl (log p_old(tau_i) - log p_ref(tau_i)) takes the place of R_i. Not
    standardised, that has the on-policy gradient of the centred, relative `SoftmaxTB` with beta R in place of R and kl 1.

    The sampler makes the method: `ChainSampler` is Flow-GRPO (whose loss is divided by the number of steps), its `window` MixGRPO,
    `TreeSampler` BranchGRPO. A step that all samples of a prompt share has no advantage.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. None is taken with kl 0
        kl: weight of the reference, >= 0, in units of the (standardised) reward
        kl_in: see above
        standardize: divide the advantage by the group's standard deviation, and not only centre it
        clip: half width of the trust region of a step's ratio; None does not clip. The authors' release takes 1e-4 with density "mean"
        ratio_norm: normalise the log-ratio of each step as `RatioNorm` does, so that early and late steps are clipped alike (GRPO-Guard)
        level_weights: undo the shrinking of the gradient at edges that many leaves of a group share (`Paths.level_weights`)
        updates: inner updates on the same trajectories
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a reference that could move, a group of one sample, a batch without stochastic edges, several updates with the ratio
            of a summed log-density.

    Reference: Flow-GRPO, arXiv:2505.05470; MixGRPO, arXiv:2507.21802; BranchGRPO, arXiv:2509.06040; GRPO-Guard, arXiv:2510.22319.
    """

    policy: Policy
    reference: Policy | None = None
    kl: float = 0.04
    kl_in: Literal["loss", "reward"] = "loss"
    standardize: bool = True
    clip: float | None = attrs.field(default=1e-3, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    ratio_norm: bool = False
    level_weights: bool = False
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _replay: PathLosses = attrs.field(init=False, repr=False)
    _reference_log_prob: Tensor | None = attrs.field(default=None, init=False, repr=False)  # [E]
    _reference_steps: tuple[Tensor, Gaussian] | None = attrs.field(default=None, init=False, repr=False)  # parents [U], out of each

    def __attrs_post_init__(self) -> None:
        self.reference = optional_reference(self.policy, self.reference, self.kl, "FlowGRPO.kl")
        if self.updates > 1 and self.policy.kernel.density == "sum" and not self.ratio_norm:
            raise ValueError(
                f"FlowGRPO.updates must be 1 where the kernel's log-density is a 'sum'; got {self.updates}. One update moves a step by "
                "many nats, so every ratio would be clipped: take ratio_norm=True, or a kernel with density 'mean'."
            )
        numbers = self._numbers if self.ratio_norm or self._divergence_in_loss else None
        self._replay = PathLosses(self.policy, None, self.rows, numbers, "group" if self.level_weights else None, self.updates)

    @property
    def _divergence_in_loss(self) -> bool:
        return self.reference is not None and self.kl_in == "loss"

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses, self.updates),)

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy} if self.reference is None else {"policy": self.policy, "reference": self.reference}

    def after_step(self) -> None:
        self._reference_steps = None  # as large as latents

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_comparable(batch.trajectories, "FlowGRPO")
        if update == 0 and self.reference is not None:
            self._replay_reference(self.reference, batch.trajectories)
        yield from self._replay(batch, update, self._loss)

    @torch.no_grad()
    def _replay_reference(self, reference: Policy, trajectories: TrajectoryBatch) -> None:
        """Once a batch: a number of each edge; and where the divergence has a gradient, the mean that siblings share.

        These means are the one thing here that grows with the forest as the forest itself does (a sixth of it for 3 x 3 x 3). Without
        them each pass over each micro-batch would evaluate the reference again.
        """
        edges = Edges.of(trajectories)
        steps, log_probs = [], []
        for piece in torch.arange(len(edges.parent)).split(self.rows or len(edges.parent)):
            some = edges.below(piece)
            step = replay_parents(reference, trajectories, some)
            log_probs.append(step.select(some.owner).log_prob(trajectories.latents[some.child]))
            if self._divergence_in_loss:
                steps.append(step)
        self._reference_log_prob = torch.cat(log_probs)
        require_finite(self._reference_log_prob, trajectories, edges.child, "reference")
        if steps:
            whole = attrs.evolve(steps[0], mean=torch.cat([step.mean for step in steps]), std=torch.cat([step.std for step in steps]))
            self._reference_steps = edges.parent, whole

    def _numbers(self, trajectories: TrajectoryBatch, edges: Edges, transition: Gaussian) -> dict[str, Tensor]:
        """What is kept of the transitions of some edges."""
        numbers = shift_numbers(trajectories, edges, transition) if self.ratio_norm else {}
        if self._reference_steps is not None:
            parent, steps = self._reference_steps
            numbers["kl"] = gaussian_kl(transition, steps.select(torch.searchsorted(parent, edges.parent)[edges.owner]))
        return numbers

    def _loss(self, paths: Paths) -> Loss:
        batch, group = paths.batch, paths.group
        trajectories, child = batch.trajectories, paths.edges.child
        count = torch.tensor(len(group))
        metrics: Metrics = {}
        rewards = batch.rewards.double()
        if self._reference_log_prob is not None:
            drift = paths.total(paths.old - self._reference_log_prob)
            metrics["log_ratio/reference"] = (drift.sum(), count)
            if self.kl_in == "reward":
                rewards = rewards - self.kl * drift
        advantage = group_normalize(rewards, group) if self.standardize else centered(rewards, group)
        log_ratio = self._log_ratio(paths)
        surrogate = clipped_surrogate(trajectories.node_mean(advantage)[child], log_ratio, self.clip)
        share = 1 / torch.bincount(group)[group].double()
        weight = _sum_below(share, paths)  # the mean over leaves of path sums, as a sum over edges
        value = (weight * surrogate).sum() / batch.groups
        if self._divergence_in_loss:
            divergence = paths.numbers["kl"]
            value = value + self.kl * (weight * divergence).sum() / batch.groups
            metrics["kl"] = (paths.total(divergence.detach()).sum(), count)
        ratio, edges = log_ratio.detach().exp(), torch.tensor(len(child))
        outside = (ratio - 1).abs() > (self.clip or float("inf"))
        metrics |= {
            "loss": (value.detach() * batch.groups, torch.tensor(len(trajectories.condition))),
            "ratio/mean": (ratio.sum(), edges),
            "ratio/clipped": (outside.double().sum(), edges),
            "advantage/std": (advantage.std() * count, count),
        }
        return Loss(value, metrics)

    def _log_ratio(self, paths: Paths) -> Tensor:
        """[E] of each step, with its gradient."""
        log_ratio = paths.log_prob - paths.old
        if not self.ratio_norm:
            return log_ratio
        size = paths.batch.trajectories.latents[0].numel()
        shift = Shift(paths.numbers["squares"], paths.numbers["std"], self.policy.kernel.density, size)
        return shift.normalized(log_ratio)


def _sum_below(values: Tensor, paths: Paths) -> Tensor:
    """Sum of a leaf value over the leaves below each edge: [K] -> [E]."""
    trajectories = paths.batch.trajectories
    inside = trajectories.paths >= 0
    below = values[:, None].expand_as(trajectories.paths)[inside]
    return values.new_zeros(len(trajectories.latents)).index_add(0, trajectories.paths[inside], below)[paths.edges.child]


def gaussian_kl(policy: Gaussian, reference: Gaussian) -> Tensor:
    """KL(p || q) = E_p[log p - log q] of each row, in the convention of the log-density: [B], float64, with a gradient.

    "sum"      ||m_p - m_q||^2 / (2 s_q^2) + D (ln(s_q / s_p) + s_p^2 / (2 s_q^2) - 1/2)
    "mean"     that divided by D
    "squared"  ||m_p - m_q||^2 / D
    """
    squares = (policy.mean - reference.mean).flatten(1).square().sum(dim=1, dtype=torch.float64)
    size = policy.mean[0].numel()
    if policy.density == "squared":
        return squares / size
    own, other = policy.std.double(), reference.std.double()
    spread = (other / own).log() + own.square() / (2 * other.square()) - 0.5
    total = squares / (2 * other.square()) + size * spread
    return total if policy.density == "sum" else total / size
