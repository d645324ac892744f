"""Few-step students: a policy with a fixed number of deterministic steps on a grid of its own."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import CheckpointError, Condition, Euler, Policy, Prompt, TransitionKernel
from diffalign.core.forking import view_of
from diffalign.core.spread import spread_like, whole
from diffalign.core.transition import expand
from diffalign.core.types import Size
from diffalign.embedded import SHAPEWORLD

from .flow_matching import FlowMatchingPolicy

MOST_STEPS = 8


class TDMPolicy(Policy):
    """A student of K deterministic steps: stage j takes the state at sigma s_j to s_{j+1}, on a grid that belongs to the student.

        v_j = v(x_j, s_j, c),   xhat0_j = x_j - s_j v_j,   x_{j+1} = x_j - (s_j - s_{j+1}) v_j         (DDIM = Euler, no fresh noise)

    A student means nothing on another grid, so a sampler with another number of steps is refused.

    Args:
        policy: the network behind it, of any kind; its weights are the student's
        steps: K, from 1 to 8
        grid: steps -> sigmas, or the K + 1 sigmas themselves, decreasing to 0; None takes the policy's own for K steps
        tag: appended to every prompt, with {steps} replaced by K: makes K an extra condition, for one network that serves several
        kernel: the step rule; Euler, which refuses noise, unless a study needs noisy trajectories

    Raises:
        ValueError: K outside 1..8, a grid that does not fit it.

    Reference: Luo et al., TDM, arXiv:2503.06674.
    """

    def __init__(
        self,
        policy: Policy,
        steps: int = 4,
        grid: Callable[[int], Tensor] | Sequence[float] | None = None,
        tag: str = "",
        kernel: TransitionKernel | None = None,
    ) -> None:
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"TDMPolicy.steps must lie between 1 and {MOST_STEPS}; got {steps}")
        super().__init__(kernel or Euler(), policy.latent_shape)
        self.policy, self.steps, self.grid, self.tag = policy, steps, grid, tag
        self.counter = policy.counter
        levels = policy.sigmas(steps) if grid is None else grid(steps) if callable(grid) else torch.tensor(list(grid), dtype=torch.float32)
        if levels.shape != (steps + 1,) or not bool((levels.diff() < 0).all()) or float(levels[-1]) != 0 or float(levels[0]) > 1:
            raise ValueError(f"TDMPolicy.grid must give {steps + 1} sigmas from at most 1 decreasing to 0; got {levels.tolist()}")
        self._levels = levels
        # with adapters the base is what they do not touch; a policy that trains everything has its base only now, before training
        self._base = None if _frozen(policy) else _digest(dict(policy.named_parameters()))

    @classmethod
    def from_saved(cls, policy: Policy, path: str, steps: int | None = None, kernel: TransitionKernel | None = None) -> "TDMPolicy":
        """A student that `save` wrote.

        Args:
            policy: the base that it was made from, with adapters of the same shape
            path: the folder, or "shapeworld" for the student that ships with the package
            steps: the K that is expected; None takes the student's
            kernel: the step rule, as in the constructor

        Raises:
            CheckpointError: a folder without student, another K, another base, other tensors.
        """
        folder = SHAPEWORLD / "student" if path == "shapeworld" else Path(path)
        try:
            about: dict[str, Any] = json.loads((folder / "student.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder} must hold a student (student.json, student.safetensors): {error}") from error
        if steps is not None and steps != about["steps"]:
            raise CheckpointError(f"{folder}: the student must have steps = {steps}, as asked; it was made with {about['steps']}")
        student = cls(policy, about["steps"], about["sigmas"], about["tag"], kernel)
        if student.base_digest() != about["base"]:
            raise CheckpointError(
                f"{folder}: the student was made from the base {about['base'][:12]}; this policy's base is {student.base_digest()[:12]}. "
                "Give the base that it was distilled from."
            )
        student._fill(folder / "student.safetensors")
        return student

    def save(self, folder: str) -> None:
        """Write `student.json` (K, grid, hash of the base) and the student's own tensors; adapters also as diffusers loads them."""
        self.write(folder, self.gathered(), self.base_digest())

    def gathered(self) -> dict[str, Tensor]:
        """The student's own tensors on the CPU. Where weights are sharded every process must call this, and `base_digest`."""
        return {name: whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in self.policy.own_parameters().items()}

    def write(self, folder: str, tensors: dict[str, Tensor], base: str) -> None:
        """The half of `save` that one process does.

        Args:
            folder: where to
            tensors: as `gathered`
            base: as `base_digest`
        """
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "student.safetensors")
        about = {"steps": self.steps, "sigmas": self._levels.tolist(), "tag": self.tag, "base": base}
        (place / "student.json").write_text(json.dumps(about, indent=1) + "\n")
        if isinstance(self.policy, FlowMatchingPolicy) and self.policy.adapters:
            self.policy.save_lora(folder)

    @torch.no_grad()
    def _fill(self, file: Path) -> None:
        from safetensors.torch import load_file

        tensors, mine = load_file(file), self.policy.own_parameters()
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        expected = {name: tuple(value.shape) for name, value in mine.items()}
        if odd := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
            raise CheckpointError(
                f"{file} must hold the policy's {len(mine)} own tensors; {len(odd)} differ (first: {odd[0]!r} has shape "
                f"{shapes.get(odd[0])}, the policy's {expected.get(odd[0])}). Build the policy with the adapters of the student."
            )
        for name, parameter in mine.items():
            parameter.copy_(spread_like(tensors[name], parameter))

    def base_digest(self) -> str:
        """SHA-256 of the base's tensors, rounded to bfloat16 so that it does not depend on the dtype it was loaded in."""
        return _digest(_frozen(self.policy)) if self._base is None else self._base

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        if not self.tag:
            return self.policy.encode(prompts)
        tag = self.tag.format(steps=self.steps)
        return attrs.evolve(self.policy.encode([Prompt(prompt + tag, prompt.metadata) for prompt in prompts]), prompts=tuple(prompts))

    def decode(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)

    def prior(self, noise: Tensor) -> Tensor:
        return self.policy.prior(noise)

    def sigmas(self, steps: int) -> Tensor:
        if steps != self.steps:
            raise ValueError(
                f"this student has {self.steps} steps on its own grid {[round(level, 4) for level in self._levels.tolist()]}; a sampler "
                f"with {steps} steps cannot use it. Give the sampler steps = {self.steps}."
            )
        return self._levels.clone()

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.policy.velocity(latents, sigma, condition)

    def stage(self, latents: Tensor, level: int, condition: Condition) -> tuple[Tensor, Tensor]:
        """Stage j: the next state x_{j+1} and the clean prediction xhat0_j, from one network call.

        Args:
            latents: [B, *] states at s_j
            level: j, from 0 to K - 1
            condition: B rows
        """
        count = len(latents)
        start, end = (self._levels.to(latents.device)[place].expand(count) for place in (level, level + 1))
        following = self.transition(latents, start, end, condition, torch.zeros_like(start)).mean
        return following, latents - expand(start / (start - end), latents) * (latents - following)

    def sized(self, size: Size | None) -> Policy:
        """At another size; the grid is still the student's."""
        inner = self.policy.sized(size)
        return self if inner is self.policy else view_of(self, policy=inner, latent_shape=inner.latent_shape)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return self.policy.guide(positive, negative, scale)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"policy.{name}": parameter for name, parameter in self.policy.own_parameters().items()}

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        tag = "" if pristine else self.tag  # the base has never met it
        twin = type(self)(self.policy.fork(trainable=trainable, pristine=pristine), self.steps, self._levels.tolist(), tag, self.kernel)
        twin._levels, twin._base = self._levels, self._base
        return twin


def _frozen(policy: Policy) -> dict[str, nn.Parameter]:
    """The tensors that are not the policy's own: the base of a policy with adapters."""
    own = {id(parameter) for parameter in policy.own_parameters().values()}
    return {name: parameter for name, parameter in policy.named_parameters() if id(parameter) not in own}


def _digest(tensors: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted((name.replace(".base_layer", ""), tensor) for name, tensor in tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor).cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
