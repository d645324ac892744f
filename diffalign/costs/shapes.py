"""Shapes of published models as numbers: what can be planned for a model whose files are not here."""

from collections.abc import Mapping
from types import MappingProxyType

import attrs

from ..core import Size

_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_FLUX2 = {"patch_size": 1, "in_channels": 128, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)}
_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_CLIP_L, _CLIP_L_PROJECTED, _CLIP_G, _T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
_QWEN3_4B, _QWEN25_VL_7B, _MISTRAL_24B, _GEMMA_2B = 4_022_468_096, 8_292_166_656, 24_011_361_280, 2_614_341_888
_KL_4, _KL_16, _KL_32, _WAN, _DC = 83_653_863, 83_819_683, 84_046_115, 126_892_531, 312_250_275


@attrs.frozen
class PublishedShape:
    """Shape of a published model.

    Args:
        pipeline: class name of its pipeline in diffusers
        network: class name of its denoiser in diffusers
        config: arguments of the denoiser's constructor, as in its config.json; diffusers' defaults are right for the others
        weights: parameters of the denoiser
        channels: channels of a latent, as a `Family` hands it to the denoiser
        factor: pixels of a side of an image per number of the latent's side
        texts: shapes of the tensors of one encoded text of the greatest length, by the names that the family gives them
        encoders: parameters of each text encoder, by its name in the pipeline
        autoencoder: parameters of the autoencoder, encoder and decoder
        pixels: side of the images that it was made for, in pixels
        steps: denoising steps of a rollout, where no run says otherwise
        guided: whether its pipeline uses classifier-free guidance, which doubles the network rows
    """

    pipeline: str
    network: str
    config: Mapping[str, object]
    weights: int
    channels: int
    factor: int
    texts: Mapping[str, tuple[int, ...]]
    encoders: Mapping[str, int]
    autoencoder: int
    pixels: int = 1024
    steps: int = 28
    guided: bool = False

    def latent(self, size: Size | None = None) -> tuple[int, int, int]:
        """Compute the shape of one latent, [channels, height, width].

        Args:
            size: height and width of the image in pixels; None takes the model's own

        Raises:
            ValueError: a side is not divisible by `factor`.
        """
        height, width = size or (self.pixels, self.pixels)
        if height % self.factor or width % self.factor or min(height, width) < 1:
            raise ValueError(f"size must have sides divisible by {self.factor} for {self.pipeline}; got {height} x {width}")
        return self.channels, height // self.factor, width // self.factor


PUBLISHED: Mapping[str, PublishedShape] = MappingProxyType(
    {
        "SD3.5-M": PublishedShape(
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {
                **_SD3,
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
            },
            weights=2_243_171_520,
            channels=16,
            factor=8,
            texts={"embeds": (77 + 256, 4096), "pooled": (2048,)},
            encoders={"text_encoder": _CLIP_L_PROJECTED, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL},
            autoencoder=_KL_16,
            guided=True,
        ),
        "SD3.5-L": PublishedShape(
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
            weights=8_056_627_520,
            channels=16,
            factor=8,
            texts={"embeds": (77 + 256, 4096), "pooled": (2048,)},
            encoders={"text_encoder": _CLIP_L_PROJECTED, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL},
            autoencoder=_KL_16,
            guided=True,
        ),
        "FLUX.1-dev": PublishedShape(
            "FluxPipeline",
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
            weights=11_901_408_320,
            channels=16,
            factor=8,
            texts={"embeds": (512, 4096), "pooled": (768,)},
            encoders={"text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL},
            autoencoder=_KL_16,
        ),
        "FLUX.2-klein-4B": PublishedShape(
            "Flux2KleinPipeline",
            "Flux2Transformer2DModel",
            {
                **_FLUX2,
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
            weights=3_875_544_576,
            channels=128,
            factor=16,
            texts={"embeds": (512, 7680)},
            encoders={"text_encoder": _QWEN3_4B},
            autoencoder=_KL_32,
            steps=4,
        ),
        "FLUX.2-dev": PublishedShape(
            "Flux2Pipeline",
            "Flux2Transformer2DModel",
            {
                **_FLUX2,
                "num_layers": 8,
                "num_single_layers": 48,
                "num_attention_heads": 48,
                "joint_attention_dim": 15360,
                "guidance_embeds": True,
            },
            weights=32_223_281_152,
            channels=128,
            factor=16,
            texts={"embeds": (512, 15360)},
            encoders={"text_encoder": _MISTRAL_24B},
            autoencoder=_KL_32,
        ),
        "Z-Image": PublishedShape(
            "ZImagePipeline",
            "ZImageTransformer2DModel",
            {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
            weights=6_154_908_736,
            channels=16,
            factor=8,
            texts={"embeds": (512, 2560), "lengths": ()},
            encoders={"text_encoder": _QWEN3_4B},
            autoencoder=_KL_16,
            steps=8,
        ),
        "Qwen-Image": PublishedShape(
            "QwenImagePipeline",
            "QwenImageTransformer2DModel",
            {
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
                "guidance_embeds": False,
                "axes_dims_rope": (16, 56, 56),
            },
            weights=20_430_401_088,
            channels=16,
            factor=8,
            texts={"embeds": (512, 3584), "lengths": ()},
            encoders={"text_encoder": _QWEN25_VL_7B},
            autoencoder=_WAN,
            guided=True,
        ),
        "Sana-1.6B": PublishedShape(
            "SanaPipeline",
            "SanaTransformer2DModel",
            {
                "in_channels": 32,
                "out_channels": 32,
                "num_attention_heads": 70,
                "attention_head_dim": 32,
                "num_layers": 20,
                "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112,
                "cross_attention_dim": 2240,
                "caption_channels": 2304,
                "sample_size": 32,
                "patch_size": 1,
            },
            weights=1_604_462_752,
            channels=32,
            factor=32,
            texts={"embeds": (300, 2304), "mask": (300,)},
            encoders={"text_encoder": _GEMMA_2B},
            autoencoder=_DC,
            steps=20,
            guided=True,
        ),
        "SD1.5": PublishedShape(
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            {"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
            weights=859_520_964,
            channels=4,
            factor=8,
            texts={"embeds": (77, 768)},
            encoders={"text_encoder": _CLIP_L},
            autoencoder=_KL_4,
            pixels=512,
            guided=True,
        ),
        "SDXL": PublishedShape(
            "StableDiffusionXLPipeline",
            "UNet2DConditionModel",
            _SDXL,
            weights=2_567_463_684,
            channels=4,
            factor=8,
            texts={"embeds": (77, 2048), "pooled": (1280,)},
            encoders={"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
            autoencoder=_KL_4,
            guided=True,
        ),
    }
)
