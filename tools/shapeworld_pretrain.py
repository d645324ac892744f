"""Trains the shipped ShapeWorld pipeline from random weights: `python tools/shapeworld_pretrain.py FOLDER`.

First the autoencoder on rendered images (L1), then the transformer and both text encoders together by flow matching
(arXiv:2210.02747) on its standardised latents. About two hours on two cores. Seeds are fixed; equal software gives equal weights on
one machine, another CPU gives other roundings.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffalign.shapeworld import networks
from diffalign.shapeworld.grammar import random_scenes
from diffalign.shapeworld.render import draw

DIFFUSERS_DEFAULT_LENGTH = 256
"""`max_sequence_length` of a plain `StableDiffusion3Pipeline` call."""

SHARES = {"count": 0.3, "binding": 0.15, "relation": 0.15, "text": 0.4}
"""Shares of the families among the training images. Letters have more, because a small model learns them last."""


class Float32Attention(TorchFunctionMode):
    """Attention in float32 under bfloat16 autocast: its bfloat16 backward on a CPU takes four times as long."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            with torch.autocast("cpu", enabled=False):
                return func(*(value.float() for value in args), **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def render(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Render images [count, 3, 64, 64] as uint8, with their captions."""
    generator, scenes = np.random.default_rng(seed), random_scenes(seed, SHARES)
    images = np.empty((count, 3, 64, 64), dtype=np.uint8)
    captions = []
    for index in range(count):
        scene = next(scenes)
        images[index] = np.round(draw(scene, generator) * 255).astype(np.uint8)
        captions.append(scene.caption)
    return torch.from_numpy(images), captions


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 images to [-1, 1]."""
    return images.float() / 127.5 - 1


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def log(**values: Any) -> None:
    print(json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}), flush=True)


def train_autoencoder(vae: Any, images: Tensor, steps: int, batch: int, seed: int) -> float:
    """Minimises L1 + 1e-6 KL, then standardises the latents; returns the last L1 in [0, 1] pixel units."""
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = warm_cosine(optimizer, steps, warmup=50)
    generator = torch.Generator().manual_seed(seed)
    start, mean_l1 = time.time(), 1.0
    for step in range(steps):
        pixels = to_pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        l1 = (decoded.float() - pixels).abs().mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimizer.zero_grad()
        (l1 + 1e-6 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_l1 += 0.02 * (l1.item() / 2 - mean_l1)
        if step % 100 == 99:
            log(stage="autoencoder", step=step + 1, l1=mean_l1, seconds=time.time() - start)
    standardise_channels(vae, encode_images(vae, images[:4096]))
    return mean_l1


@torch.no_grad()
def standardise_channels(vae: Any, latents: Tensor) -> None:
    """Give every latent channel standard deviation 1, by rescaling the encoder's last and the decoder's first convolution.

    The autoencoder remains the same function. The pipeline has only one scaling factor for all channels. With it alone, channels of small
    deviation, and their details, would be below the noise for most of the flow.
    """
    std = latents.std(dim=(0, 2, 3))
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    mean_rows, log_var_rows = slice(0, len(std)), slice(len(std), None)
    last.weight[mean_rows] /= std[:, None, None, None]
    last.bias[mean_rows] /= std
    last.bias[log_var_rows] -= 2 * std.log()
    first.weight *= std[None, :, None, None]
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)


def refine_decoder(vae: Any, images: Tensor, steps: int, batch: int, seed: int) -> float:
    """Trains the decoder further on the encoder's latents, which do not change; returns the last L1 in [0, 1] pixel units."""
    vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = warm_cosine(optimizer, steps, warmup=50)
    generator = torch.Generator().manual_seed(seed + 1)
    start, mean_l1 = time.time(), 0.03
    for step in range(steps):
        pixels = to_pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            decoded = vae.decode(latents).sample
        l1 = (decoded.float() - pixels).abs().mean()
        optimizer.zero_grad()
        l1.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_l1 += 0.02 * (l1.item() / 2 - mean_l1)
        if step % 100 == 99:
            log(stage="decoder", step=step + 1, l1=mean_l1, seconds=time.time() - start)
    vae.encoder.requires_grad_(True)
    return mean_l1


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Encode images to raw latent means [N, 8, 16, 16]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(to_pixels(chunk)).latent_dist.mean.float() for chunk in images.split(256)])


def condition(pipe: Any, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Encode captions like `StableDiffusion3Pipeline.encode_prompt` without a T5 encoder, but with gradients."""
    hidden, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    embeds = torch.cat(hidden, dim=-1)
    zeros = embeds.new_zeros(len(captions), length, embeds.shape[-1])
    return torch.cat([embeds, zeros], dim=1), torch.cat(pooled, dim=-1)


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw noise levels: nine in ten logit-normal, one in ten uniform; then the scheduler's own shift is applied."""
    levels = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    levels = torch.where(torch.rand(count, generator=generator) < 0.1, uniform, levels)
    return shift * levels / (1 + (shift - 1) * levels)


def train_denoiser(
    pipe: Any,
    latents: Tensor,
    captions: list[str],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    save: Callable[[], None],
) -> float:
    """Minimises E ||v(x_sigma) - (noise - x_0)||^2, with one caption in ten dropped; leaves the average of the weights in `pipe`."""
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    schedule = warm_cosine(optimizer, steps, warmup=300)
    average = EMAModel(modules.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=10, power=0.9)
    generator, choices = torch.Generator().manual_seed(seed), random.Random(seed)
    start, mean_loss = time.time(), 1.0
    for step in range(steps):
        index = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[index].float()
        texts = ["" if choices.random() < 0.1 else captions[i] for i in index.tolist()]
        length = DIFFUSERS_DEFAULT_LENGTH if step % 50 == 0 else networks.MAX_SEQUENCE_LENGTH
        sigma = noise_levels(batch, pipe.scheduler.config.shift, generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16), Float32Attention():
            embeds, pooled = condition(pipe, texts, length)
            velocity = pipe.transformer(
                hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
            )[0]
        loss = (velocity.float() - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(modules.parameters())
        mean_loss += 0.01 * (loss.item() - mean_loss)
        if step % 100 == 99:
            log(stage="denoiser", step=step + 1, loss=mean_loss, seconds=time.time() - start)
        if step % 1000 == 999 and step + 1 < steps:
            average.store(modules.parameters())
            average.copy_to(modules.parameters())
            save()
            average.restore(modules.parameters())
    average.copy_to(modules.parameters())
    modules.eval()
    return mean_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pipeline is written")
    parser.add_argument("--init", type=Path, help="continue with the pipeline of this folder; its autoencoder is kept")
    parser.add_argument("--images", type=int, default=65536)
    parser.add_argument("--autoencoder-steps", type=int, default=1100)
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=20000, help="training steps of the denoiser")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the denoiser, which a cosine brings to zero")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    images, captions = render(arguments.images, arguments.seed)
    log(stage="render", images=len(images))
    history: list[dict[str, Any]] = []
    if arguments.init is None:
        pipe = networks.pipeline(arguments.seed, layers=arguments.layers)
        train_autoencoder(pipe.vae, images, arguments.autoencoder_steps, 32, arguments.seed)
        l1 = refine_decoder(pipe.vae, images, arguments.decoder_steps, 32, arguments.seed)
        history.append({"autoencoder_steps": arguments.autoencoder_steps, "decoder_steps": arguments.decoder_steps, "l1": l1})
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(arguments.init, dtype=torch.float32)
        history += json.loads((arguments.init / "training.json").read_text())["history"]
    latents = torch.cat(list(standardised(pipe.vae, images)))
    log(stage="encode", std=latents.float().std().item())

    def save() -> None:
        save_pipeline(pipe, arguments.folder)

    loss = train_denoiser(pipe, latents, captions, arguments.steps, arguments.batch, arguments.rate, arguments.seed, save)
    save()
    settings = {name: getattr(arguments, name) for name in ("images", "steps", "rate", "batch", "seed")}
    history.append({**settings, "velocity_loss": loss})
    (arguments.folder / "training.json").write_text(json.dumps({"history": history}, indent=2))


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write the folder, with the transformer in float16: it has half the size, and plain diffusers reads it back in float32."""
    pipe.save_pretrained(folder)
    copy.deepcopy(pipe.transformer).half().save_pretrained(folder / "transformer")


def standardised(vae: Any, images: Tensor) -> Iterator[Tensor]:
    """Yield standardised latents in float16, in chunks."""
    for chunk in images.split(4096):
        yield ((encode_images(vae, chunk) - vae.config.shift_factor) * vae.config.scaling_factor).half()


if __name__ == "__main__":
    main()
