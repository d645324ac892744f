"""Qwen3-VL-8B from the tensors of a checkpoint, the places of its tokens, and pictures as it takes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core import ConfigError

from .qwen2_vl import FRAMES, HEAD_WIDTH, MERGE, VISION_HEADS
from .weights import assembled, layers

PATCH = 16
"""Side of a patch in pixels."""

MERGED = PATCH * MERGE
"""Side of a token in pixels."""

DEEPSTACK = (8, 16, 24)
"""Layers of the image tower whose features go into the first layers of the language model; no shape in the checkpoint tells."""


def multiples(height: int, width: int) -> tuple[int, int]:
    """Height and width in the nearest multiples of 32, as transformers' image processor takes a picture that has been resized before."""
    return max(1, round(height / MERGED)) * MERGED, max(1, round(width / MERGED)) * MERGED


def counted(ids: Tensor, image: int, rows: int, columns: int) -> Tensor:
    """Places of tokens in time, rows and columns, as Qwen3-VL counts them: [3, B, L].

    A token of text behind n others is at (n, n, n); one of the picture, which begins at n, at (n, n + row, n + column). The text behind
    the picture goes on at n + max(rows, columns).

    Args:
        ids: numbers of the tokens, [B, L]; in each row the picture begins at the same place
        image: number of the picture's token
        rows: rows of tokens of the picture
        columns: columns of tokens of the picture
    """
    before = int((ids[0] == image).int().argmax())
    after = ids.shape[1] - before - rows * columns
    text = torch.arange(before).expand(3, -1)
    grid = torch.stack(
        [
            torch.zeros(rows * columns, dtype=torch.long),
            torch.arange(rows).repeat_interleave(columns),
            torch.arange(columns).repeat(rows),
        ]
    )
    rest = torch.arange(after).expand(3, -1) + max(rows, columns)
    return torch.cat([text, before + grid, before + rest], dim=1).to(ids.device)[:, None].expand(3, *ids.shape)


def require_qwen3_vl(where: str) -> None:
    """Refuse a transformers that has no Qwen3-VL.

    Raises:
        ConfigError: it has none.
    """
    try:
        import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
    except ImportError as error:
        from transformers import __version__

        raise ConfigError(
            f"{where} needs Qwen3-VL, which transformers has from 4.57 on; installed is {__version__}. "
            "Install a newer one: pip install --upgrade transformers"
        ) from error


def qwen3_vl(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, image: int) -> nn.Module:
    """Build image tower and language model, without the last layer that writes.

    Args:
        tensors: visual.* and language_model.*
        where: for messages
        dtype: type of the weights
        image: number of the token whose places the picture takes

    Raises:
        ConfigError: names or shapes do not fit.
    """
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    try:
        places, seen = tensors["visual.pos_embed.weight"].shape
        vision: dict[str, Any] = {
            "depth": layers(tensors, "visual.blocks."),
            "hidden_size": seen,
            "intermediate_size": tensors["visual.blocks.0.mlp.linear_fc1.weight"].shape[0],
            "num_heads": VISION_HEADS,
            "out_hidden_size": tensors["visual.merger.linear_fc2.weight"].shape[0],
            "num_position_embeddings": places,
            "deepstack_visual_indexes": list(DEEPSTACK),
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        }
        vocabulary, width = tensors["language_model.embed_tokens.weight"].shape
        first = "language_model.layers.0"
        text: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": tensors[f"{first}.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": layers(tensors, "language_model.layers."),
            "num_attention_heads": tensors[f"{first}.self_attn.q_proj.weight"].shape[0] // HEAD_WIDTH,
            "num_key_value_heads": tensors[f"{first}.self_attn.k_proj.weight"].shape[0] // HEAD_WIDTH,
            "head_dim": HEAD_WIDTH,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5_000_000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "use_cache": False,
        }
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]!r}; it is no checkpoint of Qwen3-VL") from error
    if vision["depth"] <= DEEPSTACK[-1]:
        raise ConfigError(
            f"{where} must have more than {DEEPSTACK[-1]} layers in its image tower, as Qwen3-VL-8B has; it has {vision['depth']}. It is a "
            "checkpoint of another network."
        )

    def network(vision: dict[str, Any], text: dict[str, Any]) -> nn.Module:
        return Qwen3VLModel(Qwen3VLConfig(vision_config=dict(vision), text_config=dict(text), image_token_id=image))

    shallow = {**vision, "depth": 0, "deepstack_visual_indexes": []}, {**text, "num_hidden_layers": 0, "vocab_size": 1}
    here = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return assembled(lambda: network(vision, text), lambda: network(*shallow), here, where)
