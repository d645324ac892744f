"""GenEval on a tiny detector: its objects are those of transformers' own post-processing, its colours those of CLIP's formula."""

import sys

import pytest
import torch
from tiny_models import MEAN as CLIP_MEAN
from tiny_models import STD as CLIP_STD
from tiny_models import clip_folder, noise, shuffled
from torch.nn.functional import interpolate, normalize
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards import GenEval
from diffalign.rewards.detection import MEAN, STD, Detector
from diffalign.vocabulary import COLORS, NAMES

LABELS = ("cube", "ball", "cat")


def tiny_detector(labels):
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
    )
    torch.manual_seed(0)
    model = shuffled(Mask2FormerForUniversalSegmentation(config)).eval()
    with torch.no_grad():
        model.class_predictor.weight *= 3  # random logits would leave every class at the same score
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    detector, clip = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("clip")
    model = tiny_detector(LABELS)
    model.save_pretrained(detector)
    folder, clip_model, tokenizer = clip_folder(clip)
    return str(detector), folder, model, clip_model, tokenizer


@pytest.fixture(scope="module")
def images():
    return interpolate(noise(3, 12, 12), size=(384, 384), mode="bicubic").clamp(0, 1)


@torch.no_grad()
def theirs(model, images, least):
    """Objects by transformers' post-processing, which works at 384 x 384: (class, score, mask), surest first."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    output = model(pixel_values=(images - mean) / std)
    size = [tuple(images.shape[-2:])] * len(images)
    processor = Mask2FormerImageProcessor()
    results = processor.post_process_instance_segmentation(output, threshold=least, target_sizes=size, return_binary_maps=True)
    objects = []
    for result in results:
        own = [(LABELS[info["label_id"]], info["score"], result["segmentation"][n] > 0) for n, info in enumerate(result["segments_info"])]
        objects.append(sorted(own, key=lambda thing: -thing[1]))
    return objects


def test_objects_are_those_of_the_library(folders, images):
    detector, _, model, _, _ = folders
    expected = theirs(model, images, 0.2)
    found = Detector.load(detector, "x", 384, None).detect(images, 0.2)
    assert sum(map(len, expected)) >= 6
    assert len({name for objects in expected for name, _, _ in objects}) >= 2
    for mine, other in zip(found, expected, strict=True):
        for name in LABELS:
            own, reference = mine.get(name, []), [thing for thing in other if thing[0] == name]
            assert [thing.score for thing in own] == pytest.approx([score for _, score, _ in reference], abs=1e-5)
            for thing, (_, _, mask) in zip(own, reference, strict=True):
                assert (thing.mask != mask).float().mean() < 1e-4
                rows, columns = thing.mask.nonzero().T
                assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@torch.no_grad()
def color(clip_model, tokenizer, image, name, mask):
    """By hand, one object at a time."""
    rows, columns = mask.nonzero().T
    cut = torch.where(mask, image, torch.tensor(0.6))[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1][None]
    height, width = cut.shape[-2:]
    short = min(height, width)
    cut = interpolate(cut, size=(int(32 * height / short), int(32 * width / short)), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((cut.shape[-2] - 32) / 2), round((cut.shape[-1] - 32) / 2)
    pixels = (cut[..., top : top + 32, left : left + 32] - CLIP_MEAN) / CLIP_STD
    kinds = ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")
    tokens = tokenizer(
        [kind.format(word) for word in COLORS for kind in kinds], truncation=True, max_length=32, padding="max_length", return_tensors="pt"
    )
    output = clip_model(**tokens, pixel_values=pixels)
    logits = normalize(output.text_embeds.view(len(COLORS), 3, -1).mean(dim=1), dim=1) @ output.image_embeds[0]
    return COLORS[int(logits.argmax())]


def test_scores_are_the_rules_on_what_is_found(folders, images):
    detector, clip, model, clip_model, tokenizer = folders
    reward = GenEval(detector, clip, side=384, threshold=0.2, counting_threshold=0.25, batch=2, credit="correct")
    expected = theirs(model, images, 0.2)
    seen = {True: 0, False: 0}
    for image, objects in zip(images[:1], expected, strict=False):
        for name in LABELS:
            own = [thing for thing in objects if thing[0] == name]
            sure = [thing for thing in own if thing[1] > 0.25]
            cases = [({"include": [{"class": name, "count": 2}]}, len(own) >= 2)]
            counting = {"include": [{"class": name, "count": 1}], "exclude": [{"class": name, "count": 2}]}
            cases += [({"tag": "counting", **counting}, len(sure) == 1), (counting, len(own) == 1)]
            if own:
                is_color = color(clip_model, tokenizer, image, name, own[0][2])
                cases += [({"include": [{"class": name, "count": 1, "color": word}]}, word == is_color) for word in (is_color, "red")]
            for metadata, holds in cases:
                assert reward(image[None], [Prompt("p", metadata)]).item() == float(holds), metadata
                seen[holds] += 1
    assert min(seen.values()) >= 4, "both answers must come up"


def test_the_default_is_graded_and_batches_change_nothing(folders, images):
    detector, clip, model, _, _ = folders
    names = [objects[0][0] for objects in theirs(model, images, 0.2)]
    there = [sum(name == other for other, _, _ in objects) for name, objects in zip(names, theirs(model, images, 0.2), strict=True)]
    prompts = [Prompt("p", {"include": [{"class": name, "count": 13}]}) for name in names]
    assert GenEval(detector, clip, side=384, threshold=0.2, credit="correct")(images, prompts).tolist() == [0.0] * 3
    for batch in (1, 2):
        grades = GenEval(detector, clip, side=384, threshold=0.2, batch=batch)(images, prompts)
        assert grades.tolist() == pytest.approx([number / 13 for number in there])
    assert 0 < min(there) <= max(there) < 13


def test_another_credit_is_refused(folders):
    with pytest.raises(ValueError, match=r"GenEval\.credit must be one of graded, correct; got 'partial'"):
        GenEval(folders[0], folders[1], credit="partial")


def test_oblong_images_and_odd_sizes(folders):
    detector, _, _, _, _ = folders
    found = Detector.load(detector, "x", 96, None).detect(noise(1, 50, 150), 0.0)
    things = [thing for objects in found[0].values() for thing in objects]
    assert things
    assert all(thing.mask.shape == (50, 150) for thing in things)
    assert all(0 <= l < r <= 150 and 0 <= t < b <= 50 for l, t, r, b in (thing.box for thing in things))  # noqa: E741


def test_a_picture_with_nan_is_no_picture_without_objects(folders):
    images = noise(2, 50, 50)
    images[1, 0, 0, 0] = float("nan")
    prompt = Prompt("p", {"include": [{"class": "cube", "count": 1}]})
    with pytest.raises(ValueError, match="GenEval needs images of finite numbers; image 1 of 2, prompt 'p', holds NaN or infinity"):
        GenEval(folders[0], folders[1], side=96)(images, [prompt] * 2)


def test_prompts_are_checked_before_anything_is_drawn(folders):
    reward = GenEval(folders[0], folders[1], side=96)
    reward.require([Prompt("a", {"include": [{"class": "cube", "count": 1}]})])
    with pytest.raises(ConfigError, match="prompt 'b' has no metadata 'include'"):
        reward.require([Prompt("a", {"include": [{"class": "cube", "count": 1}]}), Prompt("b")])
    with pytest.raises(ConfigError, match="the detector knows no 'person'; it knows ball, cat, cube"):
        reward.require([Prompt("a", {"include": [{"class": "person", "count": 1}]})])


def test_eighty_classes_are_called_as_the_benchmark_calls_them():
    model = tiny_detector([f"label {n}" for n in range(80)])
    assert Detector(model).names == NAMES


def test_missing_weights_are_named(folders):
    with pytest.raises(ConfigError, match=r"GenEval\.detector must be a local folder"):
        GenEval("/nowhere", folders[1])
    with pytest.raises(ConfigError, match=r"GenEval\.clip must be a local folder"):
        GenEval(folders[0], "/nowhere")


def test_a_missing_extra_is_named(monkeypatch, folders):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"GenEval needs the package scipy: pip install 'diffalign\[geneval\]'"):
        GenEval(folders[0], folders[1])
