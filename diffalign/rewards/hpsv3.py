"""Human Preference Score v3: a vision-language model that reads an instruction, the picture and the prompt, and a head that marks them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import Prompt, Reward
from diffalign.core.words import allowed_word
from diffalign.placement import is_there, placed

from .marked_text import PIXELS, MarkedText, rank_head
from .pixels import check_batch, normalized, resized
from .qwen2_vl import MERGED, patches, towers, working_size
from .weights import every, locate, parted, read_tensors

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@attrs.define(eq=False)
class HPSv3(Reward):
    """Preference of people between images, learned by Qwen2-VL-7B on images from old models to current ones, and real photographs.

        reward = mu,   (mu, sigma) = head(h),   h = last hidden state at the token <|Reward|>, behind instruction, picture and prompt

    with a head of linear layers D-1024-16-2 and ReLU between them. Pictures are resized to about 448 x 448, sides in multiples of 28. As in
    the authors' code, all tokens, those of the picture among them, are counted 0, 1, 2, ..., and not by rows and columns as in Qwen2-VL.
    The instruction is that of their training (templates/hpsv3.txt, by the HPSv3 Team, MIT). Scale: the authors' means by model go from 5
    to 11. Licence: MIT (code); Apache-2.0 (Qwen2-VL-7B). 16 GB in bfloat16.

    Args:
        weights: the authors' checkpoint: a file, a folder or a hub id that holds `file`
        file: its name there
        tokenizer: tokenizer of Qwen2-VL, a hub id or a local folder
        batch: images that pass at once
        dtype: type of the model's weights; the head is float32
        device: device of the model; None takes that of the images

    Raises:
        ConfigError: the weights cannot be found, or are those of another network.
        ValueError: (of a call) a prompt that holds a token of the model's own, such as <|Reward|>; sides more unequal than 1 to 200.

    Reference: Ma et al., arXiv:2508.03789.
    """

    weights: str = "MizzenAI/HPSv3"
    file: str = "HPSv3.safetensors"
    tokenizer: str = "Qwen/Qwen2-VL-7B-Instruct"
    batch: int = attrs.field(default=8, validator=attrs.validators.ge(1))
    dtype: Literal["bfloat16", "float32"] = attrs.field(default="bfloat16", validator=allowed_word)
    device: str | None = attrs.field(default=None, validator=is_there)
    _text: MarkedText = attrs.field(init=False, repr=False)
    _network: nn.ModuleDict = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._text, file = every(
            lambda: MarkedText.load("HPSv3", self.tokenizer, "hpsv3.txt", _SYSTEM),
            lambda: locate(self.weights, self.file, "HPSv3.weights"),
        )
        self._network = hpsv3_network(read_tensors(file, "HPSv3.weights"), "HPSv3.weights", getattr(torch, self.dtype))
        text: Any = self._network["text"]
        self._text.require_within(text.embed_tokens.weight.shape[0])

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("HPSv3", images, prompts)
        height, width = working_size(images.shape[-2], images.shape[-1], PIXELS)
        places = height // MERGED * (width // MERGED)
        texts = [self._text.text(prompt, places) for prompt in prompts]
        device = images.device if self.device is None else placed(self.device)
        network = self._network.to(device)
        marks = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            pixels = normalized(resized(images[part].to(device, torch.float32), height, width))
            marks.append(self._marks(network, pixels, *self._text.tokens(texts[part], device)))
        return torch.cat(marks)

    def _marks(self, network: nn.ModuleDict, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text: Any = network["text"]
        flat, grid = patches(pixels)
        seen = network["vision"](flat.to(text.dtype), grid_thw=grid)
        seen = seen if isinstance(seen, Tensor) else seen.pooler_output  # a tensor before transformers 5
        embeds = text.embed_tokens(ids)
        picture = (ids == self._text.image)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(picture, seen.to(embeds.dtype))
        counted = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        read = text(inputs_embeds=embeds, attention_mask=mask, position_ids=counted, use_cache=False).last_hidden_state
        marks: Tensor = network["head"](self._text.at_mark(read, ids))[:, 0]
        return marks


def hpsv3_network(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> nn.ModuleDict:
    """Image tower ("vision") and language model ("text") of a checkpoint of HPSv3 in a dtype, and its "head" in float32, in eval mode.

    Raises:
        ConfigError: names or shapes do not fit.
    """
    head, others = parted(tensors, "rm_head.")
    _, own = parted(others, "lm_head.")  # of the model that writes
    marking = rank_head(head, where, "HPSv3")
    return nn.ModuleDict({**towers(own, where, dtype), "head": marking}).requires_grad_(False).eval()
