"""Tiny random networks in the formats in which real ones are published, and what their tokenizers need."""

import json
import re
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from diffalign import Prompt

PROMPTS = [Prompt("a red cube"), Prompt("a sign that says hi"), Prompt("a red cube")]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
START, END = "<|startoftext|>", "<|endoftext|>"
VISION, TEXT, LAYERS, SIZE, PATCH = 32, 24, 2, 32, 8
IMAGES, WORDS = "blip.visual_encoder.", "blip.text_encoder."
"""Of the tiny ImageReward: widths, layers, sizes and the beginnings of its names."""


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


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def scale(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def image_reward_checkpoint():
    """Random weights of a tiny BLIP with the head of ImageReward, under the names of the published file."""
    shapes = {
        f"{IMAGES}cls_token": (1, 1, VISION),
        f"{IMAGES}pos_embed": (1, (SIZE // PATCH) ** 2 + 1, VISION),
        f"{IMAGES}patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        f"{IMAGES}patch_embed.proj.bias": (VISION,),
        f"{WORDS}embeddings.word_embeddings.weight": (len(bert_tokenizer()), TEXT),
        f"{WORDS}embeddings.position_embeddings.weight": (40, TEXT),
        **scale(f"{IMAGES}norm", VISION),
        **scale(f"{WORDS}embeddings.LayerNorm", TEXT),
        **linear("blip.vision_proj", VISION, 8),
    }
    for n in range(LAYERS):
        block, layer = f"{IMAGES}blocks.{n}.", f"{WORDS}encoder.layer.{n}."
        shapes |= {**scale(f"{block}norm1", VISION), **scale(f"{block}norm2", VISION)}
        shapes |= {**linear(f"{block}attn.qkv", VISION, 3 * VISION), **linear(f"{block}attn.proj", VISION, VISION)}
        shapes |= {**linear(f"{block}mlp.fc1", VISION, 4 * VISION), **linear(f"{block}mlp.fc2", 4 * VISION, VISION)}
        for kind, seen in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= {**linear(f"{layer}{kind}.output.dense", TEXT, TEXT), **scale(f"{layer}{kind}.output.LayerNorm", TEXT)}
            for part in ("query", "key", "value"):
                shapes |= linear(f"{layer}{kind}.self.{part}", TEXT if part == "query" else seen, TEXT)
        shapes |= {**linear(f"{layer}intermediate.dense", TEXT, 48), **linear(f"{layer}output.dense", 48, TEXT)}
        shapes |= scale(f"{layer}output.LayerNorm", TEXT)
    for number, (inputs, outputs) in {0: (TEXT, 12), 2: (12, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}.items():
        shapes |= linear(f"mlp.layers.{number}", inputs, outputs)
    return {**filled(shapes), f"{WORDS}embeddings.position_ids": torch.arange(40)[None]}


def image_reward_folder(path):
    """A folder with such a checkpoint and its tokenizer."""
    torch.save(image_reward_checkpoint(), path / "ImageReward.pt")
    bert_tokenizer().save_pretrained(path)
    return path


def aesthetic_head(folder, widths=(16, 12, 8, 6, 4, 1)):
    """As published: dropout between the layers takes every other number, but the last two follow each other."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    torch.save(tensors, folder / "aesthetic-model.pth")
    return tensors
