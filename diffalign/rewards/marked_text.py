"""Text around a picture with a token at whose place the head looks, and the head: parts that HPSv3 and HPSv3++ share."""

import string
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import ConfigError, Prompt

from .qwen2_vl import IMAGE, MERGED
from .weights import fill, pretrained

MARK = "<|Reward|>"
"""The token at whose place the head looks; the authors added it to the vocabulary, as its last."""

PIXELS = 256 * MERGED**2
"""Pixels of an image as it is shown to the model."""

_CHAT = "<|im_start|>user\n<|vision_start|>$picture<|vision_end|>$text<|im_end|>\n<|im_start|>assistant\n"


@attrs.frozen(eq=False)
class MarkedText:
    """Text that a model reads about a picture: the picture's places, an instruction with the prompt, and the mark.

    Args:
        reward: name of the reward, for messages
        tokenizer: tokenizer of the model, with the mark as its last token
        source: folder or hub id of the tokenizer, for messages
        instruction: text with a place for $prompt
        before: text before the turn of the user
    """

    reward: str
    tokenizer: Any
    source: str
    instruction: string.Template
    before: str = ""

    @classmethod
    def load(cls, reward: str, source: str, template: str, before: str = "") -> Self:
        """Load the tokenizer from a folder or a hub id, and the instruction from a file of templates/.

        Raises:
            ConfigError: the tokenizer cannot be found.
        """
        from transformers import AutoTokenizer

        instruction = files("diffalign.rewards").joinpath(f"templates/{template}").read_text(encoding="utf-8")
        tokenizer = pretrained(AutoTokenizer.from_pretrained, source, f"{reward}.tokenizer")
        tokenizer.padding_side = "right"
        tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
        return cls(reward, tokenizer, source, string.Template(instruction), before)

    @property
    def image(self) -> int:
        """Number of the token whose places the picture takes."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    def require_within(self, known: int) -> None:
        """Refuse a tokenizer that has more tokens than the network knows.

        Raises:
            ConfigError: it has.
        """
        if len(self.tokenizer) > known:
            raise ConfigError(
                f"{self.reward}.tokenizer must have at most {known - 1} tokens, and {MARK} as one more; {self.source!r} has "
                f"{len(self.tokenizer) - 1}. It is the tokenizer of another network."
            )

    def text(self, prompt: Prompt, places: int) -> str:
        """Write what the model reads about one image of `places` tokens.

        Raises:
            ValueError: the prompt holds a token of the model's own.
        """
        for token in self.tokenizer.added_tokens_decoder.values():  # all_special_tokens forgets its own where the mark is added
            if token.special and token.content in prompt:
                raise ValueError(
                    f"{self.reward} cannot read the prompt {str(prompt)!r}: {token.content} is a token of the model's own. "
                    "Write it differently."
                )
        text = self.instruction.substitute(prompt=str(prompt))
        return self.before + string.Template(_CHAT).substitute(picture=IMAGE * places, text=text)

    def tokens(self, texts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Split texts into tokens, padded on the right: numbers of the tokens and the mask of those that are no padding, [B, L]."""
        found = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(device)
        return found["input_ids"], found["attention_mask"]

    def at_mark(self, read: Tensor, ids: Tensor) -> Tensor:
        """Take the hidden states [B, L, D] at the mark: [B, D], float32."""
        place = (ids == self.tokenizer.convert_tokens_to_ids(MARK)).int().argmax(dim=1)
        return read[torch.arange(len(ids), device=ids.device), place].float()


def rank_head(tensors: Mapping[str, Tensor], where: str, checkpoint: str) -> nn.Sequential:
    """Build the head of a checkpoint in float32: linear layers D-1024-16-2 with ReLU between them.

    Args:
        tensors: rm_head.N.weight and rm_head.N.bias of the places N = 0, 3 and 5, without "rm_head."
        where: for messages
        checkpoint: name of what the checkpoint should be, for messages

    Raises:
        ConfigError: names or shapes do not fit.
    """
    try:
        shapes = [tensors[f"{place}.weight"].shape for place in ("0", "3", "5")]
        linear = [nn.Linear(inputs, outputs, device="meta") for outputs, inputs in shapes]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{where} must hold rm_head.0, rm_head.3 and rm_head.5; it is no checkpoint of {checkpoint}") from error
    head = nn.Sequential(linear[0], nn.ReLU(), nn.Identity(), linear[1], nn.ReLU(), linear[2])  # the authors have dropout in the middle
    fill(head, {name: tensor.float() for name, tensor in tensors.items()}, f"{where} (head)")
    return head
