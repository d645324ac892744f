"""ImageReward against BLIP written out here, and the names of the published checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    IMAGES,
    LAYERS,
    MEAN,
    PATCH,
    PROMPTS,
    STD,
    WORDS,
    bert_tokenizer,
    image_reward_checkpoint,
    image_reward_folder,
    noise,
    published,
)

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards import ImageReward
from diffalign.rewards.image_reward import blip_network, to_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_reward_folder(tmp_path_factory.mktemp("image_reward"))


def dense(x, tensors, name):
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def norm(x, tensors, name, eps):
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def attend(query, key, value, heads, mask=None):
    """[B, L, D] -> [B, L, D]; mask [B, S] is 1 where a key counts."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (scores.softmax(dim=-1) @ split[2]).transpose(1, 2).flatten(2)


def look(pixels, t):
    """The image tower: pre-norm blocks, 16 heads, a last norm."""
    x = F.conv2d(pixels, t[f"{IMAGES}patch_embed.proj.weight"], t[f"{IMAGES}patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([t[f"{IMAGES}cls_token"].expand(len(x), 1, -1), x], dim=1) + t[f"{IMAGES}pos_embed"]
    for n in range(LAYERS):
        block = f"{IMAGES}blocks.{n}."
        query, key, value = dense(norm(x, t, f"{block}norm1", 1e-6), t, f"{block}attn.qkv").chunk(3, dim=-1)
        x = x + dense(attend(query, key, value, 16), t, f"{block}attn.proj")
        x = x + dense(F.gelu(dense(norm(x, t, f"{block}norm2", 1e-6), t, f"{block}mlp.fc1")), t, f"{block}mlp.fc2")
    return norm(x, t, f"{IMAGES}norm", 1e-6)


def read(prompts, seen, t):
    """BERT with a cross-attention in each layer: post-norm, 12 heads; prompts padded to 35 tokens."""
    tokens = bert_tokenizer()(list(map(str, prompts)), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    x = t[f"{WORDS}embeddings.word_embeddings.weight"][ids] + t[f"{WORDS}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, t, f"{WORDS}embeddings.LayerNorm", 1e-12)
    for n in range(LAYERS):
        layer = f"{WORDS}encoder.layer.{n}."
        for kind, source, counts in (("attention", None, mask), ("crossattention", seen, None)):
            keys = x if source is None else source
            query = dense(x, t, f"{layer}{kind}.self.query")
            key, value = dense(keys, t, f"{layer}{kind}.self.key"), dense(keys, t, f"{layer}{kind}.self.value")
            attended = dense(attend(query, key, value, 12, counts), t, f"{layer}{kind}.output.dense")
            x = norm(attended + x, t, f"{layer}{kind}.output.LayerNorm", 1e-12)
        hidden = F.gelu(dense(x, t, f"{layer}intermediate.dense"))
        x = norm(dense(hidden, t, f"{layer}output.dense") + x, t, f"{layer}output.LayerNorm", 1e-12)
    return x[:, 0]


@pytest.mark.parametrize("batch", [16, 2])
def test_score_is_the_standardised_mark(folder, batch):
    images, t = noise(4, 64, 48), image_reward_checkpoint()
    prompts = [*PROMPTS, Prompt("more words than the encoder reads at once " * 3)]
    pixels = F.interpolate(images, size=(42, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 5:37, :]
    value = read(prompts, look((pixels - MEAN) / STD, t), t)
    for number in (0, 2, 4, 6, 7):
        value = dense(value, t, f"mlp.layers.{number}")
    expected = (value[:, 0] - 0.16717362830052426) / 1.0333394966054072
    scores = ImageReward(str(folder), tokenizer=str(folder), batch=batch)(images, prompts)
    assert scores.std() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_published_checkpoint_fits():
    """BLIP-large's image tower and its BERT with cross-attention, by name and shape."""
    tensors = published("ImageReward.pt")
    with torch.device("meta"):
        network = blip_network(
            {name: tensor for name, tensor in tensors.items() if not name.startswith("blip.text_encoder.embeddings.position_ids")}, "w"
        )
    assert sum(parameter.numel() for parameter in network["vision"].parameters()) == 303_301_632
    assert (network["vision"].config.image_size, network["vision"].config.patch_size) == (224, 16)
    assert network["text"].config.vocab_size == 30524
    # too small to show in a score
    assert (network["vision"].config.layer_norm_eps, network["text"].config.layer_norm_eps) == (1e-6, 1e-12)
    left = tensors.keys() - {name for name in tensors if "position_ids" in name or ("_proj." in name and "encoder" not in name)}
    assert len(to_transformers(tensors, "w")) == len(left) == len(network.state_dict())


def test_other_checkpoints_are_refused(folder, tmp_path):
    tensors = image_reward_checkpoint()
    for name in ("blip.text_decoder.cls.bias", "blip.visual_encoder.head.weight"):
        torch.save({**tensors, name: torch.zeros(1)}, tmp_path / "ImageReward.pt")
        with pytest.raises(ConfigError, match=f"ImageReward.weights has an unknown '{name}'"):
            ImageReward(str(tmp_path), tokenizer=str(folder))
    for name in (f"{IMAGES}pos_embed", f"{WORDS}encoder.layer.0.intermediate.dense.weight", f"{IMAGES}norm.bias", "mlp.layers.7.bias"):
        torch.save({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "ImageReward.pt")
        with pytest.raises(ConfigError, match=r"ImageReward\.weights"):
            ImageReward(str(tmp_path), tokenizer=str(folder))
