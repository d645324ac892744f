"""Policy of a published model without its weights, on torch's meta device: what a run can be planned with before anything is downloaded."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..core import TransitionKernel
from ..policies import CallGraphs, Compilation, FlowMatchingPolicy, LoRA
from ..policies.choices import read_choices
from ..policies.diffusers import Family, Quantization, Setting, families
from ..policies.diffusers.mapped import default_dtype
from .shapes import PUBLISHED, PublishedShape
from .sizes import tensor_bytes

PLACES: Mapping[str, str] = MappingProxyType(
    {
        "stabilityai/stable-diffusion-3.5-medium": "SD3.5-M",
        "stabilityai/stable-diffusion-3.5-large": "SD3.5-L",
        "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
        "black-forest-labs/FLUX.2-klein-4B": "FLUX.2-klein-4B",
        "black-forest-labs/FLUX.2-dev": "FLUX.2-dev",
        "Tongyi-MAI/Z-Image": "Z-Image",
        "Tongyi-MAI/Z-Image-Turbo": "Z-Image",
        "Qwen/Qwen-Image": "Qwen-Image",
        "Qwen/Qwen-Image-2512": "Qwen-Image",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "Sana-1.6B",
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "Sana-1.6B",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD1.5",
        "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    }
)
"""Hub ids of models with a published shape."""

_BITS: Mapping[Quantization, float] = MappingProxyType({"nf4": 4.13, "int8": 8.0})

_FIXED_TEXTS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose texts always have the length of their CLIP."""


def shape_of(path: str) -> PublishedShape:
    """Find the shape of a model by its hub id, or by its name in `PUBLISHED`.

    Raises:
        ValueError: its shape is not known.
    """
    if path not in PLACES and path not in PUBLISHED:
        raise ValueError(
            f"policy.path must be a model whose shape is known to be planned without weights: {', '.join([*PLACES, *PUBLISHED])}; got "
            f"{path!r}. Leave out --no-weights for a pipeline that is on this machine."
        )
    return PUBLISHED[PLACES.get(path, path)]


@attrs.frozen(eq=False)
class ZeroTexts:
    """Encoded texts of the greatest length, without numbers.

    Args:
        shapes: shapes of the tensors of one text, by name
        dtype: type of the text encoders
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def of(self, texts: Sequence[str], device: torch.device, negative: bool = False) -> dict[str, Tensor]:
        """Tensors [P, ...] of P texts."""
        tensors = {name: torch.zeros(len(texts), *shape, dtype=self.dtype, device="meta") for name, shape in self.shapes.items()}
        if "lengths" in tensors:
            tensors["lengths"] = torch.full((len(texts),), self.shapes["embeds"][0])
        return tensors


def unloaded(
    path: str,
    lora: LoRA | None = None,
    kernel: TransitionKernel | None = None,
    grid: Any = None,
    dtype: str = "float32",
    max_sequence_length: int | None = None,
    resolution: int | Sequence[int] | None = None,
    guidance: float | None = None,
    checkpointing: bool = False,
    offload: bool = False,
    compute: str | None = None,
    compilation: Compilation | None = None,
    graphs: CallGraphs | None = None,
    quantization: Quantization | None = None,
    trainable: bool = True,
) -> FlowMatchingPolicy:
    """Make the policy that `FlowMatchingPolicy.from_pretrained` would load, without its weights.

    Args:
        path: hub id of a model with a published shape, or its name in `PUBLISHED`
        lora: adapters, whose `start` is not read; None trains all weights
        kernel, grid, dtype, max_sequence_length, resolution, guidance, checkpointing, offload, compute, compilation, graphs: see there
        quantization: only checked; `saved_bytes` says what it saves
        trainable: see there

    Raises:
        ValueError: the shape is not known, an argument does not fit it, or the arguments do not go together.
    """
    import diffusers

    lora, dtype = read_choices(lora, dtype, quantization, compute, trainable)
    shape, typed = shape_of(path), getattr(torch, dtype)
    kind = next(family for family in families() if shape.pipeline in family.pipelines)
    with default_dtype(typed), torch.device("meta"):
        network = getattr(diffusers, shape.network)(**shape.config).eval()
    family = kind(_pipeline(shape, kind, network, typed), Setting(_sides(resolution, shape), max_sequence_length, guidance, offload))
    family.source = path
    if lora is None:
        network.requires_grad_(trainable)
    else:
        attrs.evolve(lora, start=None, start_scale=1.0).attach(network, family.lora_targets, family)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compilation is not None:
        compilation.apply(network)
    texts, multiplied = ZeroTexts(_texts(shape, family), typed), None if compute is None else getattr(torch, compute)
    policy = FlowMatchingPolicy(network, family, kernel, grid, None, texts, compilation, compute=multiplied, graphs=graphs)
    return policy if trainable else policy.requires_grad_(False)


def saved_bytes(policy: FlowMatchingPolicy, quantization: Quantization | None) -> int:
    """Bytes that the weights of the base in the blocks take less if they are quantised. Adapters are not, frozen ones neither."""
    if quantization is None:
        return 0
    lists = [name for name, module in policy.network.named_modules() if isinstance(module, nn.ModuleList)]
    base = [
        module.weight
        for name, module in policy.network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in policy.own and any(name.startswith(f"{place}.") for place in lists)
    ]
    return sum(tensor_bytes(weight) - round(weight.numel() * _BITS[quantization] / 8) for weight in base)


class _Weights(nn.Module):
    """Component of which only the number of parameters is known."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dtype=dtype, device="meta"), requires_grad=False)


def _pipeline(shape: PublishedShape, kind: type[Family], network: nn.Module, dtype: torch.dtype) -> Any:
    import diffusers

    if kind.free_grid:
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    beside = {name: _Weights(count, dtype) for name, count in shape.encoders.items()} | {"vae": _Weights(shape.autoencoder, dtype)}
    return SimpleNamespace(
        **{kind.component: network, **beside},
        components=beside,
        vae_scale_factor=shape.factor // kind.shrink,
        default_sample_size=shape.pixels // shape.factor,
        scheduler=scheduler,
        config={},
    )


def _sides(resolution: int | Sequence[int] | None, shape: PublishedShape) -> tuple[int, int]:
    if resolution is None:
        return shape.pixels, shape.pixels
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2:
        raise ValueError(f"resolution must be one side or [height, width] in pixels; got {resolution}")
    return sides[0], sides[1]


def _texts(shape: PublishedShape, family: Family) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a text under the run's number of text tokens."""
    asked = family.setting.max_sequence_length
    if asked is None or shape.pipeline in _FIXED_TEXTS:
        return shape.texts
    less = type(family).length - asked  # Stable Diffusion 3 has the 77 tokens of CLIP beside those of T5
    return {name: (size[0] - less, *size[1:]) if name in ("embeds", "mask") else size for name, size in shape.texts.items()}
