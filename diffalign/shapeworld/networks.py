"""Untrained ShapeWorld pipeline: a small Stable Diffusion 3 (arXiv:2403.03206) in ordinary diffusers classes."""

import re
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .grammar import ALPHABET, COLORS, NUMBERS, RELATIONS, SHAPES

MAX_SEQUENCE_LENGTH = 16
"""Number of tokens of each text encoder, and of the zeros that replace the absent T5 encoder (diffusers' default is 256)."""

SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|pad|>"]


def tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer in which every word of the grammar is one token. Other text becomes bytes."""
    relations = [word for relation in RELATIONS for word in relation.split()]
    plurals = [shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES]
    words = sorted({"a", "and", "the", "text", "in", *COLORS, *SHAPES, *plurals, *NUMBERS, *relations})
    pairs = [first + second for first in ALPHABET.lower() for second in ALPHABET.lower()]
    merges: list[tuple[str, str]] = []
    for word in (word for word in words if len(word) > 1):
        pieces = _bpe([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _bpe(pieces, merges)
    broken = [pair for pair in pairs if len(_bpe([pair[0], pair[1] + "</w>"], merges)) != 2]
    if broken:
        raise ValueError(f"texts must be two tokens, one a character; these are not: {broken}")
    symbols = sorted(ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocabulary))},
        merges=merges,  # type: ignore[arg-type]
        pad_token="<|pad|>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def _bpe(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for first, second in merges:
        joined = re.sub("\0" + re.escape(f"{first}\0{second}") + "(?=\0)", f"\0{first}{second}", "\0" + "\0".join(pieces) + "\0")
        pieces = joined.strip("\0").split("\0")
    return pieces


def text_encoder(vocabulary: int, width: int = 64) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_SEQUENCE_LENGTH,
            hidden_act="gelu",
            bos_token_id=SPECIAL.index("<|startoftext|>"),
            eos_token_id=SPECIAL.index("<|endoftext|>"),
            pad_token_id=SPECIAL.index("<|pad|>"),
        )
    )


def silent_t5(width: int = 128) -> T5EncoderModel:
    """Build an encoder that returns zeros, exactly like those that Stable Diffusion 3 uses without a T5 encoder.

    It is needed because plain `StableDiffusion3Pipeline.from_pretrained(folder)` refuses a folder without this component.
    """
    encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=width, d_kv=4, d_ff=4, num_layers=1, num_heads=1))
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 64x64x3 -> 16x16x8, 0.4 M parameters."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def transformer(layers: int = 6, heads: int = 4) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=128,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def pipeline(seed: int = 0, **sizes: Any) -> Any:
    """Build the whole pipeline with random weights; `sizes` are arguments of `transformer`."""
    torch.manual_seed(seed)
    one, two = tokenizer(), tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer(**sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=autoencoder(),
        text_encoder=text_encoder(len(one)),
        tokenizer=one,
        text_encoder_2=text_encoder(len(two)),
        tokenizer_2=two,
        text_encoder_3=silent_t5(),
        tokenizer_3=T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)], extra_ids=0),
    )
