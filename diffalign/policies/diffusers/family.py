"""What a model family must say of itself: everything in which diffusers pipelines differ."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn


class Family(ABC):
    """The conventions of one model family, converted to the house's: x_sigma = (1 - sigma) x_0 + sigma noise, v = noise - x_0.

    Holds text encoders and autoencoder, but not the denoiser, which belongs to each policy. Constructed as
    `family(pipeline, max_sequence_length)`.

    Args:
        pipelines: class names, as in model_index.json, that this family serves
        lora_targets: linear layers that LoRA usually adapts
        optional: components that a folder may lack although the pipeline's constructor names them
        latent_shape: of one sample, [*]
    """

    pipelines: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    latent_shape: tuple[int, ...]

    @abstractmethod
    def __init__(self, pipeline: Any, max_sequence_length: int | None) -> None: ...

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """P texts -> tensors, each [P, ...]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[K, *] -> images [K, 3, H, W] in [0, 1]."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """The scheduler's own grid: [steps + 1]."""

    @abstractmethod
    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """V at [B, *], [B] and the encoded texts of B rows: [B, *]."""

    @abstractmethod
    def save_lora(self, network: Any, folder: str) -> None:
        """Write the adapters in the family's diffusers format."""

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the family's pipeline does it; a family may differ."""
        return negative + scale * (positive - negative)
