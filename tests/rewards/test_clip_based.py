"""The score of each reward is its published formula, computed here from the same weights by other means."""

import copy

import pytest
import torch
from PIL import Image
from tiny_models import MEAN, PROMPTS, STD, aesthetic_head, clip_folder, noise
from torch import nn
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessor

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards import Aesthetic, CLIPScore, PickScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    return noise()


def cosine(model, tokenizer, images, prompts):
    """One image and one text at a time, through CLIPModel.forward, which normalises by itself."""
    values = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = interpolate(image[None], size=(38, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 3:35, :]
        tokens = tokenizer(str(prompt), return_tensors="pt")
        output = model(pixel_values=(pixels - MEAN) / STD, input_ids=tokens["input_ids"])
        values.append(torch.cosine_similarity(output.image_embeds, output.text_embeds)[0])
    return torch.stack(values)


@torch.no_grad()
def test_pick_score_is_the_scaled_cosine(clip, images):
    folder, model, tokenizer = clip
    expected = cosine(model, tokenizer, images, PROMPTS) * model.logit_scale.exp()
    torch.testing.assert_close(PickScore(folder)(images, PROMPTS), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clip_score_is_the_positive_part_of_the_cosine(clip, images, tmp_path):
    folder, model, tokenizer = clip
    turned = copy.deepcopy(model)
    turned.visual_projection.weight.neg_()  # every cosine changes its sign, so that one of the two models shows the cut
    turned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    signs = set()
    for place, network in ((folder, model), (str(tmp_path), turned)):
        expected = cosine(network, tokenizer, images, PROMPTS)
        signs |= set(expected.sign().tolist())
        torch.testing.assert_close(CLIPScore(place)(images, PROMPTS), 2.5 * expected.clamp(min=0), rtol=1e-5, atol=1e-5)
    assert signs == {1.0, -1.0}
    prefixed = cosine(model, tokenizer, images, ["A photo depicts " + prompt for prompt in PROMPTS])
    reward = CLIPScore(folder, scale=100.0, prefix="A photo depicts ")
    torch.testing.assert_close(reward(images, PROMPTS), 100 * prefixed.clamp(min=0), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_aesthetic_is_five_linear_maps_of_unit_image_features(clip, images, tmp_path):
    folder, model, tokenizer = clip
    tensors = aesthetic_head(tmp_path)
    tokens = tokenizer("x", return_tensors="pt")["input_ids"]
    pixels = interpolate(images, size=(38, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 3:35, :]
    value = model(pixel_values=(pixels - MEAN) / STD, input_ids=tokens).image_embeds
    for number in (0, 2, 4, 6, 7):
        value = value @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    for source in (tmp_path, tmp_path / "aesthetic-model.pth"):
        reward = Aesthetic(folder, str(source))
        torch.testing.assert_close(reward(images, PROMPTS), value[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(reward(images, PROMPTS), reward(images, [Prompt("other")] * 3)), "the prompt plays no part"


def test_published_aesthetic_head_fits():
    """Names and shapes of sac+logos+ava1-l14-linearMSE.pth."""
    from diffalign.rewards.heads import linear_head

    shapes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    tensors = {f"{number}.weight": torch.zeros(shape) for number, shape in shapes.items()}
    tensors |= {f"{number}.bias": torch.zeros(shape[0]) for number, shape in shapes.items()}
    layers = linear_head(tensors, "head")
    assert [(layer.out_features, layer.in_features) for layer in layers] == list(shapes.values())
    assert all(isinstance(layer, nn.Linear) for layer in layers)


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_and_repeated_prompts_change_nothing(clip, images, batch):
    folder, _, _ = clip
    together = PickScore(folder)(images, PROMPTS)
    torch.testing.assert_close(PickScore(folder, batch=batch)(images, PROMPTS), together, rtol=1e-5, atol=1e-5)
    alone = torch.cat([PickScore(folder)(images[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_long_prompts_are_cut(clip, images):
    folder, _, _ = clip
    scores = PickScore(folder)(images, [Prompt("word " * 40), Prompt("word " * 41), Prompt("")])
    assert scores.isfinite().all()


def test_preprocessing_is_that_of_the_image_processor_up_to_8_bit_rounding():
    from diffalign.rewards.pixels import cropped_square, normalized

    size = 224
    smooth = interpolate(noise(1, 24, 20), size=(96 * 4, 80 * 4), mode="bicubic").clamp(0, 1)
    picture = Image.fromarray((smooth[0] * 255).round().byte().permute(1, 2, 0).numpy())
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    ours = normalized(cropped_square(smooth, size))[0]
    levels = ((ours - theirs) * STD * 255).abs()
    assert levels.mean() < 0.5
    assert levels.max() < 2.5


def test_what_cannot_be_loaded_is_named(clip, tmp_path):
    folder, _, _ = clip
    for kind in (PickScore, CLIPScore):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}.model must be a local folder.*'/nowhere/at/all'"):
            kind("/nowhere/at/all")
    with pytest.raises(ConfigError, match=r"PickScore.model must be a local folder .* got"):
        PickScore(str(tmp_path))  # an empty folder
    with pytest.raises(ConfigError, match=r"Aesthetic.head must be a folder that holds aesthetic-model.pth"):
        Aesthetic(folder, str(tmp_path))
    aesthetic_head(tmp_path, (20, 12, 8, 6, 4, 1))
    with pytest.raises(ConfigError, match=r"Aesthetic.model must give 20 features, which Aesthetic.head takes; .* gives 16"):
        Aesthetic(folder, str(tmp_path))
    torch.save({"layers.0.weight": torch.zeros(2, 16), "layers.0.bias": torch.zeros(2)}, tmp_path / "two.pth")
    with pytest.raises(ConfigError, match="end in one number"):
        Aesthetic(folder, str(tmp_path / "two.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="must be a checkpoint of tensors"):
        Aesthetic(folder, str(tmp_path / "junk.pth"))


def test_batches_that_do_not_fit_are_refused(clip, images):
    reward = PickScore(clip[0])
    with pytest.raises(ValueError, match="one prompt per image; got 3 images and 2 prompts"):
        reward(images, PROMPTS[:2])
    with pytest.raises(ValueError, match=r"images \[K, 3, H, W\]"):
        reward(images[:, :1], PROMPTS)
