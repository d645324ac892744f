"""Qwen2-VL from the tensors of a checkpoint: its image tower, its language model, and pictures as it takes them."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core import ConfigError

from .weights import assembled, layers

IMAGE = "<|image_pad|>"
"""The token whose places the picture takes."""

PATCH, MERGE, FRAMES = 14, 2, 2
"""Side of a patch in pixels; patches that become one token, by side; frames that become one patch, so that a picture counts twice."""

MERGED = PATCH * MERGE
"""Side of a token in pixels."""

VISION_HEADS, HEAD_WIDTH = 16, 128
"""Attention heads of the image tower, and width of a head of the language model; no shape in the checkpoint tells."""

_STEEPEST = 200


def working_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Height and width in multiples of 28, near a number of pixels and the aspect of a picture; as the authors of Qwen2-VL compute it.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > _STEEPEST * min(height, width):
        raise ValueError(f"Qwen-VL takes images whose sides are at most 1 to {_STEEPEST}; got {height} x {width}")
    sides = max(MERGED, round(height / MERGED) * MERGED), max(MERGED, round(width / MERGED) * MERGED)
    if sides[0] * sides[1] == pixels:
        return sides
    scale = math.sqrt(height * width / pixels) if sides[0] * sides[1] > pixels else math.sqrt(pixels / (height * width))
    if sides[0] * sides[1] > pixels:
        return tuple(max(MERGED, math.floor(side / scale / MERGED) * MERGED) for side in (height, width))  # type: ignore[return-value]
    return tuple(math.ceil(side * scale / MERGED) * MERGED for side in (height, width))  # type: ignore[return-value]


def patches(pixels: Tensor, side: int = PATCH) -> tuple[Tensor, Tensor]:
    """Pictures as rows of patches, those of one token behind each other; Qwen2-VL and Qwen3-VL differ only in the side of a patch.

    Args:
        pixels: [B, 3, H, W], normalised, sides multiples of 2 P
        side: side of a patch in pixels, P

    Returns:
        [B * H/P * W/P, 3 * 2 * P * P], and the grid [B, 3] of frames, rows and columns of each picture.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    split = pixels.reshape(count, channels, rows // MERGE, MERGE, side, columns // MERGE, MERGE, side)
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)  # picture, token row, token column, patch row, patch column, channel, y, x
    twice = ordered[:, :, :, :, :, :, None].expand(*ordered.shape[:6], FRAMES, side, side)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(count, 3)
    return twice.reshape(count * rows * columns, channels * FRAMES * side * side), grid


def towers(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Image tower ("vision") and language model without its last layer ("text").

    Args:
        tensors: visual.* and model.*, as checkpoints before transformers 4.52 call them, or model.visual.* and model.language_model.*
        where: for messages
        dtype: type of the weights of both

    Raises:
        ConfigError: names or shapes do not fit.
    """
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:model\.)?visual\.(.*)", name) or re.fullmatch(r"model\.(?:language_model\.)?(.*)", name)
        if match is None:
            raise ConfigError(f"{where} has an unknown {name!r}; it is a checkpoint of another network")
        parts["vision" if "visual." in name else "text"][match[1]] = tensor.to(dtype)
    vision, text = parts["vision"], parts["text"]
    try:
        vision_settings: dict[str, Any] = {
            "depth": layers(vision, "blocks."),
            "embed_dim": vision["patch_embed.proj.weight"].shape[0],
            "hidden_size": vision["merger.mlp.2.weight"].shape[0],
            "mlp_ratio": vision["blocks.0.mlp.fc1.weight"].shape[0] // vision["patch_embed.proj.weight"].shape[0],
            "num_heads": VISION_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        }
        vocabulary, width = text["embed_tokens.weight"].shape
        text_settings: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": text["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": layers(text, "layers."),
            "num_attention_heads": text["layers.0.self_attn.q_proj.weight"].shape[0] // HEAD_WIDTH,
            "num_key_value_heads": text["layers.0.self_attn.k_proj.weight"].shape[0] // HEAD_WIDTH,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
            "use_sliding_window": False,
        }
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]!r}; it is no checkpoint of Qwen2-VL") from error
    kinds: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
        "vision": (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig, vision_settings, "depth"),
        "text": (Qwen2VLTextModel, Qwen2VLTextConfig, text_settings, "num_hidden_layers"),
    }
    built: dict[str, nn.Module] = {}
    for part, (network, configuration, settings, depth) in kinds.items():
        bare = {**settings, depth: 0, **({"vocab_size": 1} if part == "text" else {})}
        built[part] = assembled(
            functools.partial(network, configuration(**settings)), functools.partial(network, configuration(**bare)), parts[part], where
        )
    return built
