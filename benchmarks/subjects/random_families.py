"""Model families with random weights: the published shapes, and tiny ones, as policies without text encoders and autoencoder.

The cost `families` runs them, `scaling` only counts them on torch's meta device; the GPU check looks at the tiny ones.
"""

from collections.abc import Callable, Mapping
from functools import partial

import attrs
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffalign import Prompt
from diffalign.core import CPS, Condition
from diffalign.policies import CallGraphs, FlowMatchingPolicy, LoRA
from diffalign.policies.arithmetic import keep_float32, set_attention
from diffalign.policies.compilation import Compilation
from diffalign.policies.diffusers import Family, Setting
from diffalign.policies.diffusers.flux import Flux
from diffalign.policies.diffusers.mapped import default_dtype
from diffalign.policies.diffusers.sd3 import StableDiffusion3


@attrs.frozen
class Shape:
    """A transformer to be made of random weights.

    Args:
        name: of the model
        network: makes it
        family: its conventions
        pixels: side of the images
        tokens: of a text
        lora: what the paper's run trains
    """

    name: str
    network: Callable[[], nn.Module]
    family: type[Family]
    pixels: int
    tokens: int
    lora: LoRA


_SD35 = partial(SD3Transformer2DModel, patch_size=2, in_channels=16, out_channels=16, qk_norm="rms_norm")
_SD35_SIZES = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "sample_size": 128, "pos_embed_max_size": 384}
_SD35_WIDTHS = {"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
_SMALL_SIZES = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "sample_size": 16, "pos_embed_max_size": 16}
_SMALL_WIDTHS = {"joint_attention_dim": 32, "caption_projection_dim": 128, "pooled_projection_dim": 32}
_SMALL_FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
small_flux = partial(FluxTransformer2DModel, **_SMALL_FLUX, joint_attention_dim=32, pooled_projection_dim=32)
"""0.5 M parameters."""

FLUX_DEV = Shape("FLUX.1-dev", partial(FluxTransformer2DModel, guidance_embeds=True), Flux, 512, 512, LoRA(rank=64, alpha=128))
SD35_MEDIUM = Shape(
    "SD3.5-M",
    partial(_SD35, **_SD35_SIZES, **_SD35_WIDTHS, dual_attention_layers=tuple(range(13))),
    StableDiffusion3,
    pixels=512,
    tokens=77 + 256,
    lora=LoRA(rank=32, alpha=32),
)
TINY_FLUX = Shape("tiny FLUX.1", partial(small_flux, guidance_embeds=True), Flux, 64, 32, LoRA(rank=8, alpha=16))
TINY_SD35 = Shape(
    "tiny SD3.5",
    partial(_SD35, **_SMALL_SIZES, **_SMALL_WIDTHS, dual_attention_layers=(0,)),
    StableDiffusion3,
    pixels=64,
    tokens=32,
    lora=LoRA(rank=8, alpha=8),
)


def pipeline(shape: Shape, dtype: torch.dtype, device: str) -> FluxPipeline | StableDiffusion3Pipeline:
    """The denoiser, made where it will run, and a scheduler; whoever asks for a text encoder or the autoencoder gets an error."""
    with default_dtype(dtype), torch.device(device):
        network = shape.network()
    if shape.family is Flux:
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), transformer=network.to(device), **absent)
    absent = dict.fromkeys(("vae", *(f"{part}{place}" for part in ("text_encoder", "tokenizer") for place in ("", "_2", "_3"))))
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=network.to(device), **absent)


def policy_of(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    checkpointing: bool = False,
    compilation: Compilation | None = None,
    graphs: CallGraphs | None = None,
) -> FlowMatchingPolicy:
    """A policy as `FlowMatchingPolicy.from_pretrained` makes it from a folder, on random weights."""
    torch.manual_seed(0)
    whole = pipeline(shape, dtype, device)
    network = whole.transformer.eval()
    set_attention(network, None, torch.device(device))
    if dtype == torch.float32:
        keep_float32(torch.device(device))
    family = shape.family(whole, Setting(resolution=(shape.pixels, shape.pixels)))
    shape.lora.attach(network, family.lora_targets)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compilation is not None:
        compilation.apply(network)
    return FlowMatchingPolicy(network, family, CPS("squared"), compilation=compilation, graphs=graphs)


def condition_of(shape: Shape, policy: FlowMatchingPolicy) -> Condition:
    """One text, of random embeddings."""
    config = policy.family.config
    drawn = torch.Generator().manual_seed(1)
    sizes = {"embeds": (1, shape.tokens, config.joint_attention_dim), "pooled": (1, config.pooled_projection_dim)}
    tensors = {name: torch.randn(size, generator=drawn).to(policy.device, policy.family.dtype) for name, size in sizes.items()}
    return Condition((Prompt("three red circles"),), torch.arange(1), tensors)


def inputs_of(policy: FlowMatchingPolicy, condition: Condition, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Latents, sigmas and conditions of a call of that many rows of one text; other latents for other rows and seeds."""
    drawn = torch.Generator().manual_seed(1000 * rows + seed)
    latents = torch.randn(rows, *policy.latent_shape, generator=drawn).to(policy.device)
    return latents, torch.full((rows,), 0.7, device=policy.device), condition.select(torch.zeros(rows, dtype=torch.long))


@attrs.frozen
class Counted:
    """A shape on the meta device, where tensors have sizes alone.

    Args:
        name: of the model
        weights: numbers in the base
        adapter: numbers in its LoRA
        forward: floating point operations of a network row
        backward: of its backward pass, with gradients of adapters and activations
    """

    name: str
    weights: int
    adapter: int
    forward: float
    backward: float


def counted(shape: Shape) -> Counted:
    """What torch's own counter finds; neither recomputed activations nor anything beside matrix products and attention counts."""
    policy = policy_of(shape, torch.float32, "meta")
    own = {id(parameter) for parameter in policy.own_parameters().values()}
    sizes: Mapping[bool, list[int]] = {True: [], False: []}
    for parameter in policy.parameters():
        sizes[id(parameter) in own].append(parameter.numel())
    latents = torch.zeros(1, *policy.latent_shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        velocity = policy.velocity(latents, torch.zeros(1, device="meta"), condition_of(shape, policy))
    with FlopCounterMode(display=False) as backward:
        velocity.sum().backward()
    return Counted(shape.name, sum(sizes[False]), sum(sizes[True]), forward.get_total_flops(), backward.get_total_flops())
