"""Features of pictures: what they see, and that models are read as transformers reads them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluation import CLIPFeatures, DINOv2Features, PixelFeatures, ShapeWorldFeatures, cosine_distance, vendi_score
from diffalign.shapeworld.render import SIZE


def picture(*spots):
    """Coloured squares of 14 pixels on white: (colour, x, y)."""
    image = torch.ones(3, SIZE, SIZE)
    colors = {"red": (0.86, 0.2, 0.18), "blue": (0.16, 0.36, 0.8)}
    for color, x, y in spots:
        image[:, y : y + 14, x : x + 14] = torch.tensor(colors[color])[:, None, None]
    return image


def distance(features, *images):
    return cosine_distance(features(torch.stack(images))).item()


def test_shapeworld_features_see_what_lies_where():
    features = ShapeWorldFeatures()
    red = picture(("red", 6, 6))
    assert distance(features, red, red) == pytest.approx(0.0, abs=1e-6)
    assert distance(features, red, picture(("red", 7, 6))) < 0.05
    assert distance(features, red, picture(("red", 44, 44))) > 0.99
    assert distance(features, red, picture(("blue", 6, 6))) == pytest.approx(1.0, abs=1e-6)
    both = picture(("red", 6, 6), ("red", 44, 44))
    assert 0.2 < distance(features, red, both) < 0.4  # cos = 1 / sqrt(2)


def test_shapeworld_features_of_empty_pictures_are_a_collapse():
    features = ShapeWorldFeatures()
    flat = torch.full((3, SIZE, SIZE), 0.3)
    assert distance(features, flat, torch.ones(3, SIZE, SIZE)) == 0.0
    assert distance(features, flat, picture(("red", 6, 6))) == 1.0
    assert features(torch.stack([flat])).abs().sum() == 0


def test_two_layouts_are_two_modes():
    images = torch.stack([picture(("red", 6, 6)), picture(("red", 44, 44))]).repeat(4, 1, 1, 1)
    assert vendi_score(ShapeWorldFeatures()(images)).item() == pytest.approx(2.0, abs=0.02)


def test_pixel_features_are_centred_and_small():
    features = PixelFeatures(side=8)
    assert features(torch.rand(2, 3, 64, 64)).shape == (2, 3 * 8 * 8)
    assert features(torch.rand(2, 3, 1, 1)).shape == (2, 3)
    assert distance(features, torch.zeros(3, 4, 4), torch.ones(3, 4, 4)) == pytest.approx(2.0)
    gray = torch.full((3, 4, 4), 0.5)
    assert distance(features, gray, gray) == 0.0


def preprocessing(folder, **settings):
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_resize": True, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "BitImageProcessor", **values}))
    return values


def by_hand(images, side, values):
    """As an image processor does it: Pillow resizes 8-bit pictures."""
    rows = []
    for image in images:
        pixels = Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).resize((side, side), Image.Resampling.BICUBIC)
        rows.append((np.asarray(pixels) / 255 - values["image_mean"]) / values["image_std"])
    return torch.tensor(np.stack(rows), dtype=torch.float32).permute(0, 3, 1, 2)


def images_in_eighths():
    blocks = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    return torch.nn.functional.interpolate(blocks, scale_factor=8)


def test_dinov2_reads_a_folder_and_its_preprocessing(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    model = Dinov2Model(Dinov2Config(**shape)).eval()
    model.save_pretrained(tmp_path)
    values = preprocessing(tmp_path, size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28})
    images = images_in_eighths()
    with torch.no_grad():
        expected = model(pixel_values=by_hand(images, 28, values)).last_hidden_state[:, 0]
    found = DINOv2Features(str(tmp_path), rows=2)(images)
    assert torch.allclose(found, expected, atol=0.02)
    assert not found.requires_grad
    assert torch.allclose(found, DINOv2Features(str(tmp_path))(images), atol=1e-5)


def test_clip_gives_the_projected_embedding(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, patch_size=8, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    values = preprocessing(tmp_path, size={"shortest_edge": 32}, crop_size=32)
    images = images_in_eighths()
    with torch.no_grad():
        expected = model(pixel_values=by_hand(images, 32, values)).image_embeds
    found = CLIPFeatures(str(tmp_path))(images)
    assert found.shape == (3, 12)
    assert torch.allclose(found, expected, atol=0.05)
