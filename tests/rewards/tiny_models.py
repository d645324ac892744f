"""Tiny random networks in the formats in which real ones are published, and what their tokenizers need."""

import json
import re
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from diffalign import Prompt

PROMPTS = [Prompt("a red cube"), Prompt("a sign that says hi"), Prompt("a red cube")]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
START, END = "<|startoftext|>", "<|endoftext|>"


def noise(count=3, height=48, width=40, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def clip_tokenizer():
    """Byte by byte; the end token is the last of the vocabulary, as in every CLIP."""
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), START, END]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], pad_token=END, model_max_length=32)


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz")]
    return BertTokenizer(vocab={word: place for place, word in enumerate(words)})


def shuffled(network, seed=0):
    """Every parameter away from its initial value: a layer norm that is swapped with another, or a bias that is lost, must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def clip_folder(folder, projection=16):
    """A CLIP that save_pretrained wrote, and the same network."""
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    model = shuffled(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


def published(name):
    """Names and shapes of a published checkpoint as tensors without memory; "{0..n}" in a name stands for n + 1 layers."""
    shapes = json.loads((Path(__file__).parents[1] / "data" / "reward_checkpoints.json").read_text())[name]
    tensors = {}
    for pattern, shape in shapes.items():
        found = re.search(r"\{0\.\.(\d+)\}", pattern)
        numbers = range(int(found[1]) + 1) if found else [0]
        for number in numbers:
            tensors[pattern.replace(found[0], str(number)) if found else pattern] = torch.empty(shape, device="meta")
    return tensors


def filled(shapes, seed=0):
    """Random tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
