"""Policy around the flow of handwritten digits that ships with the package."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import CPS, CheckpointError, Condition, Policy, Prompt, TransitionKernel, fork_module, shifted_sigmas
from ..core.words import require_word
from ..placement import taken
from .grammar import STROKES, parse
from .handwriting import SIDE
from .networks import VelocityNetwork

EMBEDDED = Path(__file__).parent / "model"
WORLD = "digits"
SCALE = 8
"""Pixels of an image per pixel of the latent, along each side."""


class DigitsPolicy(Policy):
    """Flow of handwritten digits: 1.3 million parameters on 8 x 8 pixels, conditional on prompts such as "a thin seven".

        x_sigma = (1 - sigma) x_0 + sigma noise,   x_0 in [-1, 1]^{1 x 8 x 8},   v = noise - x_0

    All weights are trained, in float32. The base follows its prompts about half the time, as its model card says.

    Args:
        network: the velocity field
        kernel: the step rule; CPS by default
        shift: shift of the sigma grid; 1 is the uniform grid

    Raises:
        ValueError: a prompt cannot be read (see `parse`).
    """

    def __init__(self, network: VelocityNetwork, kernel: TransitionKernel | None = None, shift: float = 1.0) -> None:
        super().__init__(kernel or CPS(), (1, SIDE, SIDE))
        self.network = network
        self.shift = shift

    @classmethod
    def from_pretrained(
        cls,
        path: str = WORLD,
        kernel: TransitionKernel | None = None,
        shift: float = 1.0,
        device: str = "auto",
        trainable: bool = True,
    ) -> "DigitsPolicy":
        """Load the flow that ships with the package, or one that `save` wrote.

        Args:
            path: a folder with `config.json` and `velocity.safetensors`, or "digits" for the embedded one
            kernel: the step rule; CPS by default
            shift: shift of the sigma grid
            device: "auto" takes an accelerator if there is one
            trainable: whether its tensors require gradients; a teacher's must not

        Raises:
            CheckpointError: the folder holds no such flow, or one of another world, or tensors with other names or shapes.
            ValueError: the device does not exist.
        """
        place = taken(device)
        folder = EMBEDDED if path == WORLD else Path(path)
        network = _built(_read_config(folder), folder)
        _fill(network, folder / "velocity.safetensors")
        return cls(network.to(place).requires_grad_(trainable), kernel, shift)

    def save(self, folder: str, dtype: Literal["float32", "float16"] = "float32") -> None:
        """Write `config.json` and `velocity.safetensors`, which `from_pretrained` reads.

        Args:
            folder: output folder, which is created if needed
            dtype: type of the file; with "float32" exactly the same weights are read back

        Raises:
            ValueError: the type is another.
        """
        require_word("dtype", dtype, Literal["float32", "float16"])
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        wanted = getattr(torch, dtype)
        tensors = {name: tensor.detach().to("cpu", wanted).contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, place / "velocity.safetensors")
        about = {"world": WORLD, "width": self.network.width, "depth": self.network.depth}
        (place / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        wishes = [parse(prompt) for prompt in prompts]
        classes = torch.zeros(len(wishes), 10)
        thickness = torch.zeros(len(wishes), len(STROKES))
        for row, wish in enumerate(wishes):
            classes[row, list(wish.classes)] = 1
            if wish.thickness is not None:
                thickness[row, STROKES.index(wish.thickness)] = 1
        tensors = {"classes": classes.to(self.device), "thickness": thickness.to(self.device)}
        return Condition(tuple(prompts), torch.arange(len(prompts)), tensors)

    def decode(self, latents: Tensor) -> Tensor:
        grey = ((latents + 1) / 2).clamp(0, 1)
        return F.interpolate(grey, scale_factor=SCALE, mode="nearest").expand(-1, 3, -1, -1)

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            parse(prompt)

    @property
    def examples(self) -> tuple[Prompt, Prompt]:
        return Prompt("an even digit"), Prompt("a thick seven")

    def prior(self, noise: Tensor) -> Tensor:
        return noise.to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, self.shift)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.counter.add(len(latents))
        asked = condition.tensors
        kind = next(self.network.parameters()).dtype
        told = (sigma.to(kind), asked["classes"].to(kind), asked["thickness"].to(kind))
        velocity: Tensor = self.network(latents.to(kind), *told)
        return velocity.to(latents.dtype)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        if pristine:
            raise ValueError(
                "fork(pristine=True) needs LoRA adapters to leave out; a DigitsPolicy trains all its weights. Fork it before training, or "
                "load the base again: DigitsPolicy.from_pretrained(trainable=False)."
            )
        names = [name for name, _ in self.network.named_parameters()]
        return type(self)(fork_module(self.network, names, trainable=trainable), self.kernel, self.shift)


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        other = " ShapeWorld's pipeline is loaded by FlowMatchingPolicy.from_pretrained." if folder == Path("shapeworld") else ""
        raise CheckpointError(
            f"{folder} must hold a flow of digits (config.json, velocity.safetensors), as DigitsPolicy.save writes it: {error}. Give such "
            f'a folder, or "{WORLD}" for the embedded one.{other}'
        ) from error
    if not isinstance(about, dict) or about.get("world") != WORLD:
        found = about.get("world", about.get("_class_name", "none")) if isinstance(about, dict) else type(about).__name__
        raise CheckpointError(
            f'{folder}/config.json must name the world "{WORLD}"; got {found!r}. Load the weights of another world with its own policy.'
        )
    return about


def _built(about: Mapping[str, Any], folder: Path) -> VelocityNetwork:
    for name, least in (("width", 4), ("depth", 1)):
        size = about.get(name)
        if type(size) is not int or size < least:
            raise CheckpointError(f"{folder}/config.json: {name} must be a whole number from {least} on; got {size!r}. Save the flow anew.")
    return VelocityNetwork(about["width"], about["depth"])


def _fill(network: nn.Module, file: Path) -> None:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} must be a safetensors file: {error}. Save the flow anew.") from error
    mine = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        raise CheckpointError(
            f"{file} must hold the {len(mine)} tensors that config.json describes; {len(odd)} differ (first: {odd[0]!r} must have shape "
            f"{mine.get(odd[0])}, and has {theirs.get(odd[0])}). Give a folder that DigitsPolicy.save wrote."
        )
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
