"""HPSv2 against an open_clip network written out here, and the names of the published checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MEAN, PROMPTS, STD, clip_tokenizer, filled, noise, published

from diffalign.core import ConfigError
from diffalign.rewards import HPSv2
from diffalign.rewards.open_clip import clip_config, to_transformers

TEXT, VISION, PROJECTION, LAYERS, LENGTH, SIZE, PATCH = 32, 48, 24, 2, 32, 32, 8


def block_shapes(prefix, width):
    return {
        f"{prefix}.{number}.{name}": shape
        for number in range(LAYERS)
        for name, shape in {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }.items()
    }


def checkpoint():
    shapes = {
        "positional_embedding": (LENGTH, TEXT),
        "text_projection": (TEXT, PROJECTION),
        "logit_scale": (),
        "visual.class_embedding": (VISION,),
        "visual.positional_embedding": ((SIZE // PATCH) ** 2 + 1, VISION),
        "visual.proj": (VISION, PROJECTION),
        "visual.conv1.weight": (VISION, 3, PATCH, PATCH),
        "visual.ln_pre.weight": (VISION,),
        "visual.ln_pre.bias": (VISION,),
        **block_shapes("visual.transformer.resblocks", VISION),
        "visual.ln_post.weight": (VISION,),
        "visual.ln_post.bias": (VISION,),
        **block_shapes("transformer.resblocks", TEXT),
        "token_embedding.weight": (len(clip_tokenizer()), TEXT),
        "ln_final.weight": (TEXT,),
        "ln_final.bias": (TEXT,),
    }
    return filled(shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hps")
    torch.save({"state_dict": checkpoint(), "epoch": 1}, path / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(path)
    return path


def norm(x, tensors, name):
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def transform(x, tensors, prefix, mask):
    """Pre-norm blocks with 16 heads; [B, L, D] -> [B, L, D]."""
    for number in range(LAYERS):
        own = {name.removeprefix(f"{prefix}.{number}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.{number}.")}
        y = norm(x, own, "ln_1").transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            *(y, y, y, y.shape[-1], 16, own["attn.in_proj_weight"], own["attn.in_proj_bias"], None, None, False, 0.0),
            *(own["attn.out_proj.weight"], own["attn.out_proj.bias"]),
            attn_mask=mask,
        )
        x = x + attended.transpose(0, 1)
        hidden = F.gelu(F.linear(norm(x, own, "ln_2"), own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(hidden, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


def image_features(pixels, tensors):
    x = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([tensors["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + tensors["visual.positional_embedding"]
    x = transform(norm(x, tensors, "visual.ln_pre"), tensors, "visual.transformer.resblocks", None)
    return norm(x[:, 0], tensors, "visual.ln_post") @ tensors["visual.proj"]


def text_features(prompts, tensors):
    """As open_clip: padded with zeros to full length, the highest token is the end."""
    tokens = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = clip_tokenizer()(str(prompt))["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    x = tensors["token_embedding.weight"][tokens] + tensors["positional_embedding"]
    x = norm(transform(x, tensors, "transformer.resblocks", mask), tensors, "ln_final")
    return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ tensors["text_projection"]


def test_score_is_the_cosine_of_the_open_clip_network(folder):
    images, tensors = noise(3, 64, 64), checkpoint()
    pixels = (F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1) - MEAN) / STD
    expected = torch.cosine_similarity(image_features(pixels, tensors), text_features(PROMPTS, tensors))
    scores = HPSv2(str(folder), tokenizer=str(folder))(images, PROMPTS)
    assert scores.std() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_oblong_images_are_padded_with_black(folder):
    reward, tall = HPSv2(str(folder), tokenizer=str(folder)), noise(3, SIZE, SIZE // 2)
    square = torch.zeros(3, 3, SIZE, SIZE)
    square[..., SIZE // 4 : 3 * SIZE // 4] = tall
    assert torch.equal(reward(tall, PROMPTS), reward(square, PROMPTS))


def test_published_checkpoint_fits():
    """986 million parameters of CLIP-H/14, by name and shape."""
    from transformers import CLIPModel

    tensors = published("HPS_v2.1_compressed.pt")
    assert sum(tensor.numel() for tensor in tensors.values()) == 986_109_441
    config = clip_config(tensors, 16, "weights")
    assert (config.vision_config.image_size, config.text_config.eos_token_id, config.projection_dim) == (224, 49407, 1024)
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in to_transformers(tensors, "weights").items()} == wanted


def test_other_checkpoints_are_refused(folder, tmp_path):
    tensors = checkpoint()
    for change, message in (
        ({"decoder.weight": torch.zeros(1)}, "has an unknown 'decoder.weight'"),
        ({"transformer.resblocks.0.attn.ls": torch.zeros(1)}, "has an unknown 'transformer.resblocks.0.attn.ls'"),
        ({"visual.ln_post.weight": torch.zeros(3)}, r"'vision_model.post_layernorm.weight' must have shape \(48,\); got \(3,\)"),
    ):
        torch.save({**tensors, **change}, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(ConfigError, match=f"HPSv2.weights.*{message}"):
            HPSv2(str(tmp_path), tokenizer=str(folder))
    for lost in ("visual.proj", "visual.ln_post.bias"):
        torch.save({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(ConfigError, match=r"HPSv2\.weights lacks"):
            HPSv2(str(tmp_path), tokenizer=str(folder))
