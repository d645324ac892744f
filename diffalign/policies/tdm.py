"""Few-step students: policies with a fixed number of deterministic steps on their own grid."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import CheckpointError, Condition, Euler, Policy, PolicyAround, Prompt, TransitionKernel
from diffalign.core.forking import view_of
from diffalign.core.spread import spread_like, whole
from diffalign.core.transition import expand
from diffalign.embedded import SHAPEWORLD

from .diffusers import Family
from .encodings import AT_ONCE
from .flow_matching import FlowMatchingPolicy
from .lora import require_scale
from .step_grids import grids_of, listed
from .text_length import unread


class TDMPolicy(PolicyAround):
    """Student of K deterministic steps: stage j takes the state from sigma s_j to s_{j+1}, on a grid that belongs to the student.

        v_j = v(x_j, s_j, c),   xhat0_j = x_j - s_j v_j,   x_{j+1} = x_j - (s_j - s_{j+1}) v_j         (DDIM = Euler, no fresh noise)

    A student is trained for its own grid only, so a sampler with another number of steps is refused. One set of weights can serve several
    K: `student.at(2)` is the student of 2 steps. Then the prompt must have a tag that tells the network K. The sigma is not enough: all
    grids may start at the same noise and sigma, where each K needs another velocity, and a fake score is evaluated at every sigma.

    Args:
        policy: policy inside, of any kind; its weights are the student's. With `also` it must read its prompt
        steps: K, from 1 to 8; the main one if there are several
        grid: function steps -> sigmas, or the K + 1 sigmas themselves, decreasing to 0; with `also` a list of such lists, one for each K.
            None takes the policy's own grid for K steps, the only one that a UNet can have
        tag: text appended to every prompt, with {steps} replaced by K, so that one network can serve several K
        kernel: the step rule; Euler, which refuses noise, unless a study needs noisy trajectories
        also: other numbers of steps, from 1 to 8, that the same weights serve; `DrawnSteps` draws among them

    Raises:
        ValueError: a K is outside 1..8 or appears twice, a grid does not fit its K, or there are several K and the tag does not name them.

    Reference: Luo et al., TDM, arXiv:2503.06674.
    """

    def __init__(
        self,
        policy: Policy,
        steps: int = 4,
        grid: Callable[[int], Tensor] | Sequence[float | Sequence[float]] | None = None,
        tag: str = "",
        kernel: TransitionKernel | None = None,
        also: Sequence[int] = (),
    ) -> None:
        super().__init__(policy, kernel or Euler())
        self.steps, self.grid, self.tag = steps, grid, tag
        self._grids = grids_of(policy, steps, also, grid, _family(policy))
        _require_telling(tag, self.step_counts)
        # with adapters the base never changes; a policy that trains all weights has its base only now, before training
        self._base = None if _frozen(policy) else _digest(dict(policy.named_parameters()))

    @classmethod
    def from_saved(cls, policy: Policy, path: str, steps: int | None = None, kernel: TransitionKernel | None = None) -> "TDMPolicy":
        """Load a student that `save` wrote.

        Args:
            policy: base from which it was made, with adapters of the same shape
            path: folder, or "shapeworld" for the student that ships with the package
            steps: expected K, or the main one of several; None takes the student's
            kernel: step rule, as in the constructor

        Raises:
            CheckpointError: the folder holds no student, or the student has another K, another base, other tensors or another alpha / rank.
        """
        folder = SHAPEWORLD / "student" if path == "shapeworld" else Path(path)
        try:
            about: dict[str, Any] = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder} must hold a student (student.json, student.safetensors): {error}") from error
        grids = [about["sigmas"], *about.get("also", [])]
        counts = [len(levels) - 1 for levels in grids]
        if steps is not None and steps not in counts:
            raise CheckpointError(f"{folder}: the student must have steps = {steps}, as asked; it was made with {listed(counts)}")
        main = about["steps"] if steps is None else steps
        student = cls(policy, main, grids, about["tag"], kernel, [count for count in counts if count != main])
        if student.base_digest() != about["base"]:
            raise CheckpointError(
                f"{folder}: the student was made from the base {about['base'][:12]}; this policy's base is {student.base_digest()[:12]}. "
                "Give the base that it was distilled from."
            )
        student._fill(folder / "student.safetensors")
        return student

    def save(self, folder: str) -> None:
        """Write `student.json` (each K, its grid, hash of the base) and the student's tensors; adapters also in diffusers' form."""
        self.write(folder, self.gathered(), self.base_digest())

    def gathered(self) -> dict[str, Tensor]:
        """Collect the student's own tensors on the CPU. With sharded weights, every process must call this and `base_digest`."""
        return {name: whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in self.policy.own_parameters().items()}

    def write(self, folder: str, tensors: dict[str, Tensor], base: str) -> None:
        """Write the files: the half of `save` that one process does.

        Args:
            folder: output folder
            tensors: tensors from `gathered`
            base: digest from `base_digest`
        """
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "student.safetensors")
        also = [self._grids[count].tolist() for count in self.step_counts[1:]]
        about = {"steps": self.steps, "sigmas": self._levels.tolist(), "also": also, "tag": self.tag, "base": base}
        (place / "student.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
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
                f"{shapes.get(odd[0])}, the policy's {expected.get(odd[0])}). {_unlike(shapes, expected)}Build the policy with the "
                "adapters of the student."
            )
        if isinstance(self.policy, FlowMatchingPolicy) and self.policy.adapters:
            require_scale(file.parent, self.policy.network, self.policy.family.component)
        for name, parameter in mine.items():
            parameter.copy_(spread_like(tensors[name], parameter))

    def base_digest(self) -> str:
        """SHA-256 of the base's tensors, rounded to bfloat16 so that it does not depend on the type in which it was loaded."""
        return _digest(_frozen(self.policy)) if self._base is None else self._base

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        if not self.tag:
            return self.policy.encode(prompts)
        return attrs.evolve(self.policy.encode(_ended(prompts, self._suffix)), prompts=tuple(prompts))

    def encode_negative(self, text: str) -> Condition:
        return self.policy.encode_negative(text + self._suffix)

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be read with the tag of each number of steps, and such as hide the tag.

        Raises:
            ValueError: the policy inside refuses one, or cuts off what tells it the number of steps; names the prompt.
        """
        for count in self.step_counts:
            self.policy.require(_ended(prompts, self.tag.format(steps=count)))
        if len(self.step_counts) > 1 and (family := _family(self.policy)) is not None:
            texts = [*dict.fromkeys(prompts)]
            cut = [prompt for prompt, tokens in zip(texts, unread(family, _ended(texts, self._suffix)), strict=True) if tokens]
            for start in range(0, len(cut), AT_ONCE):
                self._require_all_told(cut[start : start + AT_ONCE])

    def _require_all_told(self, prompts: Sequence[Prompt]) -> None:
        for count in self.step_counts:  # at once: the policy keeps what it has encoded, so that below each text is only looked up
            self.policy.encode(_ended(prompts, self.tag.format(steps=count)))
        for prompt in prompts:
            self._require_told(prompt)

    @torch.no_grad()
    def _require_told(self, prompt: Prompt) -> None:
        first, *others = (self.policy.encode(_ended([prompt], self.tag.format(steps=count))).tensors for count in self.step_counts)
        for count, other in zip(self.step_counts[1:], others, strict=True):
            if all(torch.equal(tensor, other[name]) for name, tensor in first.items()):
                raise ValueError(
                    f"TDMPolicy.tag must tell the policy the number of steps; after the prompt {str(prompt)!r} it is cut off, so that "
                    f"{self.steps} and {count} steps are one. Shorten the prompt, or raise max_sequence_length."
                )

    @property
    def _suffix(self) -> str:
        return self.tag.format(steps=self.steps)

    @property
    def _levels(self) -> Tensor:
        return self._grids[self.steps]

    @property
    def step_counts(self) -> tuple[int, ...]:
        return (self.steps, *(count for count in self._grids if count != self.steps))

    def at(self, steps: int) -> Policy:
        if steps == self.steps:
            return self
        if steps not in self._grids:
            raise ValueError(
                f"this student serves {listed(self.step_counts)} steps; {steps} steps were asked for. Ask for one of those, or make the "
                "student with that number in `also` and distil it anew."
            )
        return view_of(self, steps=steps)

    def sigmas(self, steps: int) -> Tensor:
        if steps != self.steps:
            others = f" Its weights also serve {listed(self.step_counts[1:])} steps, by student.at(steps)." if len(self._grids) > 1 else ""
            raise ValueError(
                f"this student has {self.steps} steps on its own grid {[round(level, 4) for level in self._levels.tolist()]}; a sampler "
                f"with {steps} steps cannot use it. Give the sampler steps = {self.steps}.{others}"
            )
        return self._levels.clone()

    def stage(self, latents: Tensor, level: int, condition: Condition) -> tuple[Tensor, Tensor]:
        """Compute stage j with one network call: the next state x_{j+1} and the clean prediction xhat0_j.

        Args:
            latents: [B, *] states at s_j
            level: j, from 0 to K - 1
            condition: B rows
        """
        count = len(latents)
        start, end = (self._levels.to(latents.device)[place].expand(count) for place in (level, level + 1))
        following = self.transition(latents, start, end, condition, torch.zeros_like(start)).mean
        return following, latents - expand(start / (start - end), latents) * (latents - following)

    @property
    def without_delta(self) -> bool:
        return False  # a pristine fork has no tag

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        tag, counts = ("", (self.steps,)) if pristine else (self.tag, self.step_counts)  # the base was trained without the tag
        grids = [self._grids[count].tolist() for count in counts]
        inner = self.policy.fork(trainable=trainable, pristine=pristine)
        twin = type(self)(inner, self.steps, grids, tag, self.kernel, counts[1:])
        twin._grids, twin._base = {count: self._grids[count] for count in counts}, self._base
        return twin


def _ended(prompts: Sequence[Prompt], suffix: str) -> list[Prompt]:
    return [Prompt(prompt + suffix, prompt.metadata, prompt.source) for prompt in prompts] if suffix else list(prompts)


def _require_telling(tag: str, counts: Sequence[int]) -> None:
    """Check that the tag names the number of steps, because nothing else tells the network."""
    try:
        suffixes = {tag.format(steps=count) for count in counts}
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'TDMPolicy.tag may have only the placeholder {{steps}}, as in " in {{steps}} steps"; got {tag!r}') from error
    if len(suffixes) < len(counts):
        raise ValueError(
            f'TDMPolicy.tag must name the number of steps, as in " in {{steps}} steps": the weights serve {listed(counts)} steps, and '
            f"nothing else tells the network which; got {tag!r}"
        )


def _family(policy: Policy) -> Family | None:
    """Family of the network inside all wrappers; None if it is no pipeline's."""
    while isinstance(policy, PolicyAround):
        policy = policy.policy
    return policy.family if isinstance(policy, FlowMatchingPolicy) else None


def _frozen(policy: Policy) -> dict[str, nn.Parameter]:
    """Tensors that are not the policy's own: the base of a policy with adapters."""
    own = {id(parameter) for parameter in policy.own_parameters().values()}
    return {name: parameter for name, parameter in policy.named_parameters() if id(parameter) not in own}


def _digest(tensors: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted((name.replace(".base_layer", ""), tensor) for name, tensor in tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor).cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _unlike(student: Iterable[str], policy: Iterable[str]) -> str:
    """Name the layers on which only one of the two has adapters, as a sentence, by the names that `LoRA.targets` takes."""
    theirs, mine = _adapted(student), _adapted(policy)
    parts = []
    if absent := sorted(theirs - mine):
        parts.append(f"the policy has no adapters on {', '.join(absent)}")
    if more := sorted(mine - theirs):
        parts.append(f"the student has none on {', '.join(more)}")
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}: give LoRA.targets accordingly. " if said else ""


def _adapted(names: Iterable[str]) -> set[str]:
    """Ends of the paths of the layers that have adapters: to_q, to_out.0."""
    paths = [name.partition(".lora_")[0].split(".") for name in names if ".lora_" in name]
    return {".".join(path[-2:]) if path[-1].isdecimal() else path[-1] for path in paths}
