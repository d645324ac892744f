"""Interface of a model family: everything in which diffusers pipelines differ."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import attrs
import torch
from torch import Tensor, nn

from diffalign.core.schedule import resolution_shift
from diffalign.core.types import Size

from .foreign_names import converted
from .grids import flow_sigmas
from .source import Source


@attrs.frozen
class Setting:
    """Settings of a model that a run chooses, for every family.

    Args:
        resolution: (height, width) in pixels; None takes the model's own
        max_sequence_length: number of text tokens, if the family has this choice; None takes the pipeline's default
        guidance: guidance input of guidance-distilled networks; None takes the pipeline's default
        offload: keep text encoders and autoencoder on the CPU while they are not used
    """

    resolution: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    guidance: float | None = None
    offload: bool = False


@attrs.frozen
class PlainSteps:
    """Scheduler and grid with which the plain pipeline takes the steps of a policy.

    Args:
        scheduler: its class in diffusers
        settings: differences from the configuration of the pipeline's own scheduler; None makes it from its defaults
        argument: argument of the pipeline's call that takes the grid
        grid: levels of the network's calls, one a step
    """

    scheduler: str
    settings: Mapping[str, Any] | None
    argument: str
    grid: tuple[float, ...]


class Family(ABC):
    """Conventions of one model family, converted to the package's: x_sigma = (1 - sigma) x_0 + sigma noise, v = noise - x_0.

    It holds the pipeline without its denoiser, which belongs to each policy. Families need no registration: define a class (in a file of
    this folder, or in any imported module), and `FlowMatchingPolicy.from_pretrained` finds it.

    Args:
        pipeline: a diffusers pipeline
        setting: settings of the run

    Attributes:
        pipelines: class names, as in model_index.json, that this family serves
        lora_targets: linear layers that LoRA usually adapts
        optional: components that a folder may lack although the pipeline's constructor names them
        component: name of the denoiser in the pipeline
        length: text tokens of a plain pipeline call
        usual_guidance: guidance of a plain pipeline call, if the network was distilled with guidance as an input
        ragged: names of the encoded tensors whose first axis is as long as the text
        comfyui: ComfyUI's prefix of this family's LoRA layers; None if ComfyUI does not run the family
        channels_per_latent: entries of `config.in_channels` per latent channel (4 if the network takes 2x2 patches)
        shrink: latents are smaller than the autoencoder's by this factor on each side
        multiple: latent sides must be divisible by it; a token covers multiple^2 latents
        uniform: whether the pipeline gives its scheduler uniform sigmas 1 .. 1/steps
        free_grid: whether any grid from 1 to 0 can be used
        no_guidance: the scale with which `guide` gives the positive velocity
        latent_shape: shape of one sample, [*]
        dtype: type in which the network computes
        guidance: value of the guidance input; None if the network has none
        source: path or hub id from which the pipeline was loaded, "" if it was given as an object; `folder` is its local folder
        loaded_from: all that was said of its files (variant, revision, sub-folder, single file); None if it was given as an object
    """

    pipelines: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    component: ClassVar[str] = "transformer"
    length: ClassVar[int] = 512
    usual_guidance: ClassVar[float] = 3.5
    ragged: ClassVar[tuple[str, ...]] = ()
    comfyui: ClassVar[Literal["transformer", "unet"] | None] = "transformer"
    channels_per_latent: ClassVar[int] = 1
    shrink: ClassVar[int] = 1
    multiple: ClassVar[int] = 2
    uniform: ClassVar[bool] = True
    free_grid: ClassVar[bool] = True
    no_guidance: ClassVar[float] = 1.0
    source: str = ""
    folder: Path | None = None
    loaded_from: Source | None = None

    def __init__(self, pipeline: Any, setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        network = getattr(pipeline, self.component)
        self.config, self.dtype, self.device = network.config, network.dtype, network.device
        self.pipeline = copy.copy(pipeline)
        # some pipelines read sizes from their denoiser while they encode texts, so its configuration is kept, and nothing else
        vars(self.pipeline)[self.component] = SimpleNamespace(config=self.config, dtype=self.dtype)
        self.max_sequence_length = self.length if self.setting.max_sequence_length is None else self.setting.max_sequence_length
        self.latent_shape = self._latent_shape()
        embedded = self._reads_guidance()
        if self.setting.guidance is not None and not embedded:
            raise ValueError(
                f"guidance is an input of guidance-distilled networks, and this {type(network).__name__} was not trained with one; "
                "leave it out, and wrap the policy in Guided for classifier-free guidance"
            )
        self.guidance = None if not embedded else self.usual_guidance if self.setting.guidance is None else self.setting.guidance

    def placed(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set the device and the type in which the denoiser, which still waits on the host, will compute."""
        self.device, self.dtype = device, dtype
        vars(self.pipeline)[self.component] = SimpleNamespace(config=self.config, dtype=dtype)

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Encode P texts to tensors, each [P, ...]. Tensors of different text length are padded with zeros and come with `lengths` [P]."""

    @abstractmethod
    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Velocity v at latents [B, *], sigma [B] and the encoded texts of B rows: [B, *]."""

    def renamed_lora(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename pairs of LoRA matrices from other naming schemes to diffusers' names, as the family's pipeline does it."""
        return converted(self.pipeline, self.config, tensors)

    def encode_negative(self, prompt: str) -> Mapping[str, Tensor]:
        """Encode the text that guidance leads away from: tensors, each [1, ...]. Some pipelines encode it in another way than a prompt."""
        return self.encode([prompt])

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the family's pipeline does it, `scale` being the pipeline's own number."""
        return negative + scale * (positive - negative)

    def prior(self, noise: Tensor) -> Tensor:
        """Turn unit noise [B, *] into latents at sigmas[0]."""
        return noise

    def shift(self, steps: int) -> float:
        """Log-shift mu of a scheduler with dynamic shifting: linear in the number of tokens, through the scheduler's two points."""
        config = self.pipeline.scheduler.config
        low = config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)
        return math.log(resolution_shift(self.tokens, low, (config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15))))

    def sigmas(self, steps: int) -> Tensor:
        """Noise grid of the scheduler: [steps + 1]."""
        return flow_sigmas(self.pipeline.scheduler, steps, self.shift(steps), uniform=self.uniform)

    def plain_steps(self, sigmas: Tensor) -> PlainSteps:
        """Find out how the plain pipeline takes Euler steps on a grid [steps + 1] of this family."""
        return PlainSteps("FlowMatchEulerDiscreteScheduler", None, "sigmas", tuple(sigmas[:-1].tolist()))

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn latents [K, *] into the input of the autoencoder's decoder."""
        config = self.pipeline.vae.config
        scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [K, *] to images [K, 3, H, W] in [0, 1]."""
        vae = self.pipeline.vae
        with self.resident("vae"):
            images = vae.decode(self.unscale(latents.to(vae.dtype)), return_dict=False)[0]
        images = images[:, :, 0] if images.ndim == 5 else images  # a video autoencoder gives one frame here
        result: Tensor = (images.float() / 2 + 0.5).clamp(0, 1)
        return result

    @contextmanager
    def resident(self, prefix: str) -> Iterator[None]:
        """Keep the components whose names begin with `prefix` on the device; with `offload`, only while the context is open."""
        parts = [part for name, part in self.pipeline.components.items() if name.startswith(prefix) and isinstance(part, nn.Module)]
        if not self.setting.offload:
            yield
            return
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts:
                part.to("cpu")

    def sized(self, size: Size) -> Self:
        """Copy the family for images of another size. Texts and weights do not depend on it.

        Raises:
            ValueError: the family cannot draw this size.
        """
        twin = copy.copy(self)
        twin.setting = attrs.evolve(self.setting, resolution=size)
        twin.latent_shape = twin._latent_shape()
        return twin

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        factor = self.pipeline.vae_scale_factor * self.shrink
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @property
    def tokens(self) -> int:
        """Number of image tokens of one sample."""
        return self.latent_shape[1] * self.latent_shape[2] // self.multiple**2

    def _reads_guidance(self) -> bool:
        """True if the network was distilled with guidance as an input."""
        return bool(self.config.get("guidance_embeds", False))

    def _latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor * self.shrink
        usual = (self.config.get("sample_size") or getattr(self.pipeline, "default_sample_size", 128)) * self.pipeline.vae_scale_factor
        size = self.setting.resolution or (usual, usual)
        if any(side < 1 or side % (factor * self.multiple) for side in size):
            raise ValueError(
                f"resolution must have sides divisible by {factor * self.multiple} for a {type(self.pipeline).__name__}; "
                f"got {size[0]} x {size[1]} (height x width)"
            )
        return (self.config.in_channels // self.channels_per_latent, size[0] // factor, size[1] // factor)
