"""An objective with a second network of its own: a critic learns the reward, and its gradient moves the policy."""

import attrs
import torch

from diffalign.core import Condition, Euler, Follower, Loss, Phase, Policy, fork_module, group_normalize, shifted_sigmas
from diffalign.objectives import ForwardLosses, ForwardObjective, GridDraws


class Critic(Policy):
    """Value Q of latents, [B, *] -> [B, 1]. Its `velocity` is that value, so the loop treats it as any other weights."""

    def __init__(self, network, latent_shape):
        super().__init__(Euler(), latent_shape)
        self.network = network

    @classmethod
    def beside(cls, policy, hidden=64):
        """A critic of a policy's latents, with the same weights in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = torch.nn.Linear(torch.Size(policy.latent_shape).numel(), hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, 1)
        kind = torch.promote_types(policy.precision, torch.float32)
        return cls(torch.nn.Sequential(torch.nn.Flatten(), *layers).to(policy.device, kind), policy.latent_shape)

    def velocity(self, latents, sigma, condition):
        return self.network(latents.to(next(self.parameters()).dtype))  # counts no rows: they cost far less than the policy's

    def fork(self, *, trainable=False, pristine=False):
        own = [name for name, _ in self.network.named_parameters()]
        return Critic(fork_module(self.network, own, trainable=trainable), self.latent_shape)

    def encode(self, prompts):
        return Condition(tuple(prompts), torch.arange(len(prompts)), {})

    def prior(self, noise):
        return noise.to(self.device)

    def sigmas(self, steps):
        return shifted_sigmas(steps, 1.0)

    def decode(self, latents):
        raise NotImplementedError("a critic draws no pictures")


@attrs.define(eq=False)
class CriticGuided(ForwardObjective):
    """First the critic fits the rewards of finished samples, then the policy climbs the critic's value of its clean predictions."""

    policy: Policy
    weight: float = 1.0
    fits: int = 4
    levels: int = 2
    rows: int | None = None
    critic: Critic = attrs.field(init=False)
    held: Critic = attrs.field(init=False)
    _forward: ForwardLosses = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.critic = Critic.beside(self.policy)
        self.held = self.critic.fork()  # frozen: the policy's loss moves it as little as a reference
        draws = GridDraws(self.levels, sigma_min=0.0, shared=False)
        self._forward = ForwardLosses(self.policy, None, Follower(0.0), draws, "critic_guided", "CriticGuided")

    def policies(self):
        return {"policy": self.policy, "critic": self.critic, "held": self.held}

    def phases(self):
        return Phase({"critic": self.critic}, self.fitted, self.fits), Phase({"policy": self.policy}, self.losses)

    def after_update(self, role):
        if role == "critic":
            self.held.lerp_(self.critic, 1.0)

    def fitted(self, batch, update):
        forest, target = batch.trajectories, group_normalize(batch.rewards, batch.trajectories.group)
        weight = 1 / (torch.bincount(forest.group)[forest.group] * batch.groups)
        sigma = forest.sigmas[-1].expand(len(target))
        for some in torch.arange(len(target)).split(self.rows or len(target)):
            condition = forest.condition.select(forest.group[some])
            error = (self.critic.velocity(forest.samples[some], sigma[some], condition).squeeze(1) - target[some]).square()
            yield Loss((weight[some] * error).sum(), {"critic/error": (error.detach().sum(), torch.tensor(len(some)))})

    def losses(self, batch, update):
        forward = self._forward.draw(batch, update, self.rows)

        def loss_of(noised, units):
            velocity = noised.velocity(self.policy)
            sigma = noised.sigma.reshape(-1, *[1] * (velocity.ndim - 1)).to(velocity)
            value = self.held.velocity(noised.latents - sigma * velocity, torch.zeros_like(noised.sigma), noised.condition).squeeze(1)
            metrics = {"critic/value": (value.detach().sum(), torch.tensor(len(units)))}
            return Loss(-self.weight * (forward.weight[units] * value).sum(), metrics)

        yield from forward.apart(loss_of)
