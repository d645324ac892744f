"""A tokenizer of bytes with the special tokens of Qwen-VL, and patches of a picture by loops."""

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

OWN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def qwen_tokenizer():
    symbols = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={symbol: place for place, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": OWN})
    return tokenizer


def marked_tokenizer():
    """The same with the mark as its last token."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*OWN, "<|Reward|>"]})
    return tokenizer


def rows_of_patches(picture, side):
    """Patches of a picture [3, H, W], the four of a token behind each other, each twice in time."""
    rows = []
    for token_row in range(picture.shape[-2] // (2 * side)):
        for token_column in range(picture.shape[-1] // (2 * side)):
            for row in range(2):
                for column in range(2):
                    top, left = 2 * side * token_row + side * row, 2 * side * token_column + side * column
                    patch = picture[:, top : top + side, left : left + side]
                    rows.append(torch.stack([patch, patch], dim=1).flatten())  # channel, frame, y, x
    return torch.stack(rows)
