"""A policy of your own: a small network in the plane, which reads the words "left" and "right"."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffalign.core import CPS, Condition, Policy, Prompt, TransitionKernel, fork_module, shifted_sigmas

WORDS = ("left", "right")


class HalvesPolicy(Policy):
    """Velocity of points in the plane. The network maps x, y, sigma and the word, [B, 5], to it, [B, 2]."""

    def __init__(self, network: torch.nn.Module | None = None, kernel: TransitionKernel | None = None) -> None:
        super().__init__(kernel or CPS(), latent_shape=(2,))
        self.network = network or torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))

    @classmethod
    def from_pretrained(cls, path: str, kernel: TransitionKernel | None = None) -> "HalvesPolicy":
        """Load what `save` wrote."""
        policy = cls(kernel=kernel)
        policy.network.load_state_dict(load_file(Path(path) / "halves.safetensors"))
        return policy

    def save(self, folder: str) -> None:
        """Write the weights, for `diffalign export`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), Path(folder) / "halves.safetensors")

    @property
    def examples(self):
        return Prompt("left"), Prompt("right")

    def require(self, prompts):
        if unknown := [str(prompt) for prompt in prompts if prompt not in WORDS]:
            raise ValueError(f"HalvesPolicy reads {' and '.join(WORDS)}; got {unknown[0]!r}")

    def encode(self, prompts):
        self.require(prompts)
        word = torch.tensor([[float(prompt == known) for known in WORDS] for prompt in prompts])
        return Condition(tuple(prompts), torch.arange(len(prompts)), {"word": word.to(self.device)})

    def prior(self, noise):
        return noise.to(self.device)

    def sigmas(self, steps):
        return shifted_sigmas(steps, 1.0)

    def velocity(self, latents, sigma, condition):
        self.counter.add(len(latents))
        inputs = torch.cat([latents, sigma[:, None], condition.tensors["word"]], dim=1)
        return self.network(inputs.to(next(self.network.parameters()).dtype)).to(latents.dtype)

    def decode(self, latents):
        """A bright row and column at the place of the point, on 16 x 16 pixels."""
        axis = torch.linspace(-2, 2, 16, device=latents.device)
        column, row = ((-(axis - latents[:, place, None]).square() * 8).exp() for place in (0, 1))
        return (row[:, None, :, None] * column[:, None, None, :]).expand(-1, 3, -1, -1)

    def fork(self, *, trainable=False, pristine=False):
        if pristine:
            raise ValueError("fork(pristine=True) needs LoRA, which HalvesPolicy does not have")
        own = [name for name, _ in self.network.named_parameters()]
        return type(self)(fork_module(self.network, own, trainable=trainable), self.kernel)
