"""Tiny random pipelines of every model family, in ordinary diffusers and transformers classes: nothing is downloaded.

`saved(factory, name)` writes one with `save_pretrained`, once a session.
"""

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel

BYTES = sorted(ByteLevel.alphabet())
LETTERS = [chr(code) for code in range(33, 127)]
WIDTH = 16
"""Of every text encoder."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip(projection=True):
    vocabulary = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *BYTES, *(symbol + "</w>" for symbol in BYTES)]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], pad_token="<|pad|>", model_max_length=40
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        hidden_act="gelu",
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config), tokenizer


def t5():
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config), tokenizer


def qwen_tokenizer():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *BYTES])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "right"
    return tokenizer


def qwen3(kind, layers):
    return kind(
        transformers.Qwen3Config(
            vocab_size=300,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        )
    )


def gemma():
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS])}
    config = transformers.Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        head_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    return transformers.Gemma2Model(config), transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=300)


def autoencoder(blocks=(4, 4), scaling=1.5, shift=0.06):
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift,
        scaling_factor=scaling,
    )


def sd3():
    (one, words), (two, words_two), (three, words_three) = clip(), clip(), t5()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
        ),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words_two,
        text_encoder_3=three,
        tokenizer_3=words_three,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds):
    (one, words), (two, words_two) = clip(projection=False), t5()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words_two,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds),
    )


def flux2_autoencoder():
    vae = AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux2_dev():
    """Without `save_pretrained`: its multimodal processor cannot be made from nothing, so a text tokenizer stands in."""
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 300,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "max_position_embeddings": 512,
            "num_attention_heads": 2,
            "num_hidden_layers": 40,  # as deep as the released one: the pipeline reads layers 10, 20, 30
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": None,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": WIDTH,
            "image_size": 30,
            "patch_size": 6,
            "num_channels": 3,
        },
        vision_feature_layer=-1,
        image_token_index=1,
    )
    return Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
        vae=flux2_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def flux2_transformer(guidance_embeds):
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2_klein(is_distilled=False):
    return Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False),
        text_encoder=qwen3(transformers.Qwen3ForCausalLM, layers=36),  # as deep as the released one: the pipeline reads layers 9, 18, 27
        tokenizer=qwen_tokenizer(),
        vae=flux2_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        is_distilled=is_distilled,
    )


def z_image():
    network = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=WIDTH,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )
    torch.nn.init.ones_(network.x_pad_token)  # made by torch.empty
    torch.nn.init.ones_(network.cap_pad_token)
    return ZImagePipeline(
        transformer=network,
        text_encoder=qwen3(transformers.Qwen3Model, layers=2),
        tokenizer=qwen_tokenizer(),
        vae=autoencoder(scaling=0.36, shift=0.12),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image():
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH},
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 1.0, 2.0],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def sana():
    encoder, tokenizer = gemma()
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=32,
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def unet(**options):
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        **options,
    )


def sd15(prediction="epsilon"):
    encoder, tokenizer = clip(projection=False)
    return StableDiffusionPipeline(
        unet=unet(cross_attention_dim=WIDTH),
        vae=autoencoder(scaling=0.18, shift=None),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    (one, words), (two, words_two) = clip(projection=False), clip()
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        vae=autoencoder(scaling=0.13, shift=None),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words_two,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"),
    )


BUILD = {
    "sd3": sd3,
    "flux-dev": lambda: flux(guidance_embeds=True),
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
    "sd15": sd15,
    "sd15-v": lambda: sd15("v_prediction"),
    "sdxl": sdxl,
}


def built(build, seed=0):
    """A pipeline with weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    model.set_progress_bar_config(disable=True)
    return model


def saved(factory, name):
    """The folder of one, as `save_pretrained` writes it; pytest's `tmp_path_factory` keeps it for the session."""
    folder = factory.getbasetemp() / f"tiny-{name}"
    if not folder.exists():
        built(BUILD[name]).save_pretrained(folder)
    return str(folder)
