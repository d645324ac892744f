"""Conversion of open_clip checkpoints to transformers' CLIPModel, which is the same network with other names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.core import ConfigError

from .weights import fill

_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def to_transformers(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename the tensors of an open_clip checkpoint to those of CLIPModel.

    Query, key and value of a block are one matrix there, which is split; projections are transposed.

    Raises:
        ConfigError: there is a name that no CLIP of open_clip has.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":  # a constant that some versions store
            continue
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            renamed.update(_block(name, tensor, where) if _BLOCK.fullmatch(name) else {_plain(name, where): tensor})
    return renamed


def _plain(name: str, where: str) -> str:
    stem, _, kind = name.rpartition(".")
    if name in _NAMES:
        return _NAMES[name]
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    raise ConfigError(f"{where} has an unknown {name!r}; it is no CLIP checkpoint of open_clip")


def _block(name: str, tensor: Tensor, where: str) -> dict[str, Tensor]:
    found = _BLOCK.fullmatch(name)
    assert found is not None
    tower, number, inner = found.groups()
    layer = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        pieces = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": piece.contiguous() for letter, piece in pieces}
    stem, _, kind = inner.rpartition(".")
    if stem not in _IN_A_BLOCK:
        raise ConfigError(f"{where} has an unknown {name!r}; it is no CLIP checkpoint of open_clip")
    return {f"{layer}.{_IN_A_BLOCK[stem]}.{kind}": tensor}


def clip_config(tensors: Mapping[str, Tensor], heads: int, where: str) -> Any:
    """Build the CLIPConfig that fits the shapes of an open_clip checkpoint.

    Args:
        tensors: tensors by their names in open_clip
        heads: attention heads of both towers, which no shape shows
        where: Class.field for the message

    Raises:
        ConfigError: a tensor that every CLIP has is missing.
    """
    from transformers import CLIPConfig

    try:
        patches, patch = tensors["visual.positional_embedding"].shape[0] - 1, tensors["visual.conv1.weight"].shape[-1]
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        vision_width, projection = tensors["visual.proj"].shape
        text = {
            "vocab_size": vocabulary,
            "max_position_embeddings": tensors["positional_embedding"].shape[0],
            "hidden_size": text_width,
            "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            # the features are read at the end token, which is the last of the vocabulary
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
        }
        vision = {
            "hidden_size": vision_width,
            "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "patch_size": patch,
            "image_size": patch * round(patches**0.5),
        }
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]!r}; it is no CLIP checkpoint of open_clip") from error
    blocks = [found.groups() for name in tensors if (found := _BLOCK.fullmatch(name))]
    for tower, values in (("visual.", vision), (None, text)):
        layers = 1 + max(int(number) for owner, number, _ in blocks if owner == tower)
        values.update(num_hidden_layers=layers, num_attention_heads=heads, hidden_act="gelu", projection_dim=projection)  # type: ignore[call-overload]
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def clip_model(tensors: Mapping[str, Tensor], heads: int, where: str) -> Any:
    """Build the CLIPModel of an open_clip checkpoint, float32, in eval mode.

    Raises:
        ConfigError: names or shapes do not fit.
    """
    from transformers import CLIPModel

    config = clip_config(tensors, heads, where)
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = CLIPModel(config)
    fill(model, {name: tensor.float() for name, tensor in to_transformers(tensors, where).items()}, where)
    restore_positions(model)
    return model.eval().requires_grad_(False)


def restore_positions(model: torch.nn.Module) -> None:
    """Restore the position numbers of a network that was built without memory: 0, 1, ... in each `position_ids` [1, n]."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            if last != "position_ids":
                raise RuntimeError(f"{type(model).__name__}.{name} is no count of positions and cannot be restored")
            model.get_submodule(owner).register_buffer(last, torch.arange(buffer.shape[-1])[None], persistent=False)
