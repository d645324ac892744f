"""CPU seconds that each built-in reward takes for an image of 512 x 512, on one core.

Networks have the size of the published ones and random weights: nothing is downloaded, and the time is the same. Processor time of this
process and its children is counted, so that other programs on the machine do not matter much. The largest needs 5 GB of memory.

Args:
    only: rewards
"""

import os
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from diffalign import Prompt
from diffalign.rewards import OCR, JPEGCompressibility
from diffalign.rewards.clip import CLIP
from diffalign.rewards.detection import Detector
from diffalign.shapeworld.grammar import scenes
from diffalign.shapeworld.render import draw
from diffalign.shapeworld.scorers import CompositionalReward

Call = Callable[[torch.Tensor, Sequence[Prompt]], Any]
PROMPT = Prompt('a photo of a wooden sign that says "Open late" in front of a small restaurant', {"text": "Open late"})


def pictures(count: int, size: int = 512) -> torch.Tensor:
    """Noise with a line of text on it: [count, 3, size, size]."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        small = Image.fromarray(random.integers(100, 255, (16, 16, 3), dtype=np.uint8))
        picture = small.resize((size, size), Image.Resampling.BICUBIC)
        ImageDraw.Draw(picture).text((size // 5, size // 2), "Open late", fill="black", font=ImageFont.load_default(size // 8))
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def clip(text: tuple[int, int, int], vision: tuple[int, int, int], patch: int, projection: int) -> CLIP:
    """A CLIP of (width, layers, heads) of both towers."""
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], pad_token="<|endoftext|>")
    sizes = [
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
        for width, layers, heads in (text, vision)
    ]
    sizes[0] |= {"vocab_size": 49408, "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    config = CLIPConfig(text_config=sizes[0], vision_config={**sizes[1], "patch_size": patch, "image_size": 224}, projection_dim=projection)
    return CLIP(CLIPModel(config).eval(), tokenizer)


def image_reward() -> Call:
    """ImageReward with random weights in the authors' format, by way of a file."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "rewards"))
    from tiny_models import published

    from diffalign.rewards import ImageReward

    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: torch.empty(tensor.shape).normal_(0, 0.02) for name, tensor in published("ImageReward.pt").items()}
        torch.save(tensors, f"{folder}/ImageReward.pt")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]
        BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(folder)
        return ImageReward(folder, tokenizer=folder)


def detector() -> Call:
    """Mask2Former with Swin-S at 800 pixels, as GenEval uses it; colours would come on top."""
    backbone = SwinConfig(
        embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    network = Detector(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80)).eval())
    return torch.no_grad()(lambda images, prompts: network.detect(images, 0.3))


def cosine(*sizes: Any) -> Call:
    return torch.no_grad()(clip(*sizes).cosine)


REWARDS: dict[str, tuple[Callable[[], Call], int]] = {
    "JPEGCompressibility": (JPEGCompressibility, 8),
    "OCR, rapidocr": (OCR, 4),
    "OCR, tesseract": (lambda: OCR(engine="tesseract"), 4),
    "CLIPScore (B/32)": (lambda: cosine((512, 12, 8), (768, 12, 12), 32, 512), 4),
    "Aesthetic (L/14)": (lambda: cosine((768, 12, 12), (1024, 24, 16), 14, 768), 2),
    "PickScore, HPSv2 (H/14)": (lambda: cosine((1024, 24, 16), (1280, 32, 16), 14, 1024), 2),
    "ImageReward (BLIP-L)": (image_reward, 2),
    "GenEval, detector": (detector, 2),
}


def seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def per_image(reward: Call, images: torch.Tensor, prompts: Sequence[Prompt]) -> float:
    reward(images[:1], prompts[:1])
    start = seconds()
    reward(images, prompts)
    return (seconds() - start) / len(images)


def main(only: tuple[Literal["ShapeWorld", *REWARDS], ...] = ("ShapeWorld", *REWARDS)) -> None:
    table = Table("reward", "CPU seconds per image")
    drawn = [scenes(family)[0] for family in ("count", "binding", "relation", "text")] * 4
    small = torch.from_numpy(np.stack([draw(scene, np.random.default_rng(n)) for n, scene in enumerate(drawn)]))
    captions = [Prompt(scene.caption) for scene in drawn]
    written = [(image, prompt) for image, prompt, scene in zip(small, captions, drawn, strict=True) if scene.family == "text"] * 3
    if "ShapeWorld" in only:
        table.add_row("ShapeWorld scorers, 64 x 64", f"{per_image(CompositionalReward(), small, captions):.4f}")
        words = torch.stack([image for image, _ in written]), [prompt for _, prompt in written]
        table.add_row("OCR, rapidocr, 64 x 64", f"{per_image(OCR(), *words):.3f}")
    for name, (build, count) in REWARDS.items():
        if name not in only:
            continue
        if "tesseract" in name and not shutil.which("tesseract"):
            table.add_row(name, "not installed here")
            continue
        table.add_row(name, f"{per_image(build(), pictures(count), [PROMPT] * count):.3f}")
    Console().print(table)
