"""What a model family must say of itself: everything in which diffusers pipelines differ."""

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


@attrs.frozen
class Setting:
    """What a run chooses about its model, whatever the family.

    Args:
        resolution: (height, width) in pixels; None is the model's own
        max_sequence_length: text tokens, where the family has such a choice; None is its pipeline's default
        guidance: input of guidance-distilled networks; None is the pipeline's default
        offload: text encoders and autoencoder stay on the CPU while they have nothing to do
    """

    resolution: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    guidance: float | None = None
    offload: bool = False


class Family(ABC):
    """The conventions of one model family, converted to the house's: x_sigma = (1 - sigma) x_0 + sigma noise, v = noise - x_0.

    Holds the pipeline without its denoiser, which belongs to each policy. A family is found by its class alone: define one (a file of
    this folder, or any module that is imported) and `FlowMatchingPolicy.from_pretrained` knows it.

    Args:
        pipeline: a diffusers pipeline
        setting: choices of the run

    Attributes:
        pipelines: class names, as in model_index.json, that this family serves
        lora_targets: linear layers that LoRA usually adapts
        optional: components that a folder may lack although the pipeline's constructor names them
        component: name of the denoiser in the pipeline
        length: text tokens of a plain pipeline call
        usual_guidance: of a plain pipeline call, where the network was distilled with it as an input
        ragged: names of the encoded tensors whose first axis is as long as the text
        comfyui: how ComfyUI names this family's LoRA layers; None where it does not run the family
        channels_per_latent: entries of `config.in_channels` per latent channel (4 where the network takes 2x2 patches)
        shrink: latents are smaller than the autoencoder's by this factor on each side
        multiple: latent sides must be divisible by it; a token covers multiple^2 latents
        uniform: whether the pipeline hands its scheduler uniform sigmas 1 .. 1/steps
        free_grid: whether any grid from 1 to 0 can be walked
        no_guidance: the scale with which `guide` gives the positive velocity
        latent_shape: of one sample, [*]
        dtype: in which the network computes
        guidance: value of the guidance input; None where the network has none
        source: path or hub id that the pipeline was loaded from, "" where it was given as an object; `folder` is where it lies
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

    def __init__(self, pipeline: Any, setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        network = getattr(pipeline, self.component)
        self.config, self.dtype, self.device = network.config, network.dtype, network.device
        self.pipeline = copy.copy(pipeline)
        # some pipelines ask their denoiser for sizes while they encode texts; nothing else of it is kept
        vars(self.pipeline)[self.component] = SimpleNamespace(config=self.config, dtype=self.dtype)
        self.max_sequence_length = self.length if self.setting.max_sequence_length is None else self.setting.max_sequence_length
        self.latent_shape = self._latent_shape()
        embedded = bool(self.config.get("guidance_embeds", False))
        if self.setting.guidance is not None and not embedded:
            raise ValueError(
                f"guidance is an input of guidance-distilled networks, and this {type(network).__name__} was not trained with one; "
                "leave it out, and wrap the policy in Guided for classifier-free guidance"
            )
        self.guidance = None if not embedded else self.usual_guidance if self.setting.guidance is None else self.setting.guidance

    def placed(self, device: torch.device, dtype: torch.dtype) -> None:
        """The denoiser waits elsewhere: this is where, and in which type, it will compute."""
        self.device, self.dtype = device, dtype
        vars(self.pipeline)[self.component] = SimpleNamespace(config=self.config, dtype=dtype)

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """P texts -> tensors, each [P, ...]. Ragged ones are padded with zeros and come with their `lengths` [P]."""

    @abstractmethod
    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """V at [B, *], [B] and the encoded texts of B rows: [B, *]."""

    def renamed_lora(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Pairs of LoRA matrices under names of others -> under diffusers' names, as the family's pipeline does it."""
        return converted(self.pipeline, self.config, tensors)

    def encode_negative(self, prompt: str) -> Mapping[str, Tensor]:
        """The text that guidance leads away from: tensors, each [1, ...]. Some pipelines encode it in another way."""
        return self.encode([prompt])

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the family's pipeline does it, `scale` being the pipeline's own number."""
        return negative + scale * (positive - negative)

    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise [B, *] -> latents at sigmas[0]."""
        return noise

    def shift(self, steps: int) -> float:
        """Mu of a scheduler with dynamic shifting: linear in the number of tokens, through the scheduler's two points."""
        config = self.pipeline.scheduler.config
        low = config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)
        return math.log(resolution_shift(self.tokens, low, (config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15))))

    def sigmas(self, steps: int) -> Tensor:
        """The scheduler's own grid: [steps + 1]."""
        return flow_sigmas(self.pipeline.scheduler, steps, self.shift(steps), uniform=self.uniform)

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents [K, *] -> what the autoencoder decodes."""
        config = self.pipeline.vae.config
        scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """[K, *] -> images [K, 3, H, W] in [0, 1]."""
        vae = self.pipeline.vae
        with self.resident("vae"):
            images = vae.decode(self.unscale(latents.to(vae.dtype)), return_dict=False)[0]
        images = images[:, :, 0] if images.ndim == 5 else images  # of a video autoencoder, the only frame
        result: Tensor = (images.float() / 2 + 0.5).clamp(0, 1)
        return result

    @contextmanager
    def resident(self, prefix: str) -> Iterator[None]:
        """Has the components whose names begin with `prefix` on the device; with `offload`, only inside this context."""
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
        """The same family for pictures of another size; texts and weights do not know of it.

        Raises:
            ValueError: a size that it cannot draw.
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
        """Image tokens of one sample."""
        return self.latent_shape[1] * self.latent_shape[2] // self.multiple**2

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
