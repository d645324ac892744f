"""ImageReward: BLIP's text encoder reads the prompt and attends to the image; a linear head gives the score."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import ConfigError, Prompt, Reward
from diffalign.placement import is_there, placed

from .heads import linear_head
from .open_clip import restore_positions
from .pixels import check_batch, cropped_square, normalized
from .weights import every, fill, locate, pretrained, read_tensors

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw scores on the authors' data."""

HEADS = {"vision": 16, "text": 12}
"""Attention heads of BLIP-large's image tower and of BERT-base, which no shape in the checkpoint shows."""

WORDS = 35
"""Number of tokens of a prompt that are read."""

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|blip\.text_encoder\.embeddings\.position_ids")
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


@attrs.define(eq=False)
class ImageReward(Reward):
    """Preference of people between images of the same prompt, learned by BLIP.

        reward = (mlp(h) - 0.16717) / 1.03334,    h = first token of BLIP's text encoder, which reads the prompt and attends to the image

    with mlp five linear layers 768-1024-128-64-16-1. Prompts are cut after 35 tokens.
    Scale: mean 0 and standard deviation 1 on the authors' data, in practice -2.3 to 2. Licence: Apache-2.0 (code and weights).

    Args:
        weights: the authors' checkpoint: a file, or a folder or hub id that holds `file`
        file: file name of the checkpoint there
        tokenizer: tokenizer of BERT, uncased: hub id or local folder
        batch: images per network call
        device: device of the model; None follows the images

    Raises:
        ConfigError: the weights cannot be found, or are those of another network.

    Reference: Xu et al., arXiv:2304.05977.
    """

    weights: str = "THUDM/ImageReward"
    file: str = "ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    batch: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    device: str | None = attrs.field(default=None, validator=is_there)
    _tokenizer: Any = attrs.field(init=False, repr=False)
    _network: nn.ModuleDict = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        from transformers import AutoTokenizer

        file, self._tokenizer = every(
            lambda: locate(self.weights, self.file, "ImageReward.weights"),
            lambda: pretrained(AutoTokenizer.from_pretrained, self.tokenizer, "ImageReward.tokenizer"),
        )
        self._network = blip_network(read_tensors(file, "ImageReward.weights"), "ImageReward.weights")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("ImageReward", images, prompts)
        device = images.device if self.device is None else placed(self.device)
        network = self._network.to(device)
        config: Any = network["vision"].config
        scores = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            pixels = normalized(cropped_square(images[part].to(device, torch.float32), config.image_size))
            tokens = self._tokenizer(
                list(map(str, prompts[part])), padding=True, truncation=True, max_length=WORDS, return_tensors="pt"
            ).to(device)
            seen = network["vision"](pixel_values=pixels).last_hidden_state
            read = network["text"](
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], device=device),
                is_decoder=False,  # no causal mask: the first token must see the whole prompt
            )
            scores.append(network["head"](read.last_hidden_state[:, 0]).squeeze(1))
        return (torch.cat(scores) - MEAN) / STD


def blip_network(tensors: Mapping[str, Tensor], where: str) -> nn.ModuleDict:
    """Build the image tower ("vision"), text encoder ("text") and "head" of an ImageReward checkpoint, float32, in eval mode.

    Raises:
        ConfigError: names or shapes do not fit.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    renamed = to_transformers(tensors, where)
    vision, text = (
        {name.partition(".")[2]: t.float() for name, t in renamed.items() if name.startswith(part)} for part in ("vision.", "text.")
    )
    head = {name.removeprefix("head."): tensor.float() for name, tensor in renamed.items() if name.startswith("head.")}
    try:
        width, _, _, patch = vision["embeddings.patch_embedding.weight"].shape
        vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(vision, "encoder.layers."),
            num_attention_heads=HEADS["vision"],
            patch_size=patch,
            image_size=patch * round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
        text_config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(text, "encoder.layer."),
            num_attention_heads=HEADS["text"],
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            is_decoder=True,  # builds the cross-attention
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    except KeyError as error:
        raise ConfigError(f"{where} lacks a tensor for {error.args[0]!r}; it is no checkpoint of ImageReward") from error
    with torch.device("meta"):  # no memory for weights that are replaced at once
        towers = {"vision": BlipVisionModel(vision_config), "text": BlipTextModel(text_config, add_pooling_layer=False)}
    for tower, values in (("vision", vision), ("text", text)):
        fill(towers[tower], values, where)
        restore_positions(towers[tower])
    return nn.ModuleDict({**towers, "head": linear_head(head, where)}).eval().requires_grad_(False)


def to_transformers(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename the tensors of an ImageReward checkpoint to those of BlipVisionModel ("vision."), BlipTextModel ("text.") and the head.

    The projections that only BLIP's pretraining uses are left out.

    Raises:
        ConfigError: there is a name that ImageReward does not have.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        if name.startswith("blip.visual_encoder."):
            renamed[f"vision.{_vision_name(name.removeprefix('blip.visual_encoder.'), where)}"] = tensor
        elif name.startswith("blip.text_encoder."):
            renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = tensor
        elif name.startswith("mlp.layers."):
            renamed[f"head.{name.removeprefix('mlp.layers.')}"] = tensor
        else:
            raise ConfigError(f"{where} has an unknown {name!r}; it is no checkpoint of ImageReward")
    return renamed


def _vision_name(name: str, where: str) -> str:
    for pattern, replacement in _VISION:
        found = re.match(pattern, name)
        if found:
            return found.expand(replacement) + name[found.end() :]
    raise ConfigError(f"{where} has an unknown 'blip.visual_encoder.{name}'; it is no checkpoint of ImageReward")


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix))
