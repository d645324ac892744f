"""HPSv3++ against transformers' whole Qwen3-VL, one picture at a time, with a head written out, and names of the published checkpoint."""

import re
import sys
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from tiny_models import noise, published
from tiny_qwen import OWN, marked_tokenizer, qwen_tokenizer, rows_of_patches
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from diffalign import Prompt
from diffalign.core import ConfigError, Progress, score
from diffalign.rewards import HPSv3PlusPlus, IterationRamp
from diffalign.rewards.hpsv3_plus_plus import hpsv3_plus_plus_network
from diffalign.rewards.qwen2_vl import working_size
from diffalign.rewards.qwen3_vl import counted, multiples

PROMPTS = [Prompt("a red cube"), Prompt("a sign that says $5, in the rain")]
WIDTH, INSIDE = 256, 8
PIXELS = 49 * 28**2  # a quarter of the side: attention of 25 layers over a whole picture takes seconds
HEAD = {
    "rm_head.0": (32, WIDTH),
    "rm_head.3": (16, 32),
    "rm_head.5": (2, 16),
    "cond_encoder.0": (INSIDE, 2),
    "cond_encoder.2": (INSIDE, INSIDE),
    "film_gen.0": (WIDTH, INSIDE),
    "film_gen.2": (2 * WIDTH, WIDTH),
    "cap_encoder.proj": (INSIDE, WIDTH),
    "cap_encoder.pool_attn": (1, INSIDE),
    "cap_encoder.out_proj": (1, INSIDE),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Qwen3-VL and a head, saved under the published names, and the same network and tensors."""
    folder = tmp_path_factory.mktemp("hpsv3++")
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    theta = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "rope_theta": 5e6,
            "rope_scaling": theta,
        },
        vision_config={
            "depth": 25,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 16,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    head = {}
    for name, (outputs, inputs) in HEAD.items():
        head |= {f"{name}.weight": torch.randn(outputs, inputs) / inputs**0.5, f"{name}.bias": 0.3 * torch.randn(outputs)}
    torch.save({**model.state_dict(), **head}, folder / "hpsv3++.pth")
    return folder, model, head


def reward(folder, **options):
    return HPSv3PlusPlus(str(folder), tokenizer=str(folder), dtype="float32", **options)


def hidden_by_hand(made, image, prompt):
    """Hidden state at the mark, of one picture that passes the whole network, which counts its tokens itself."""
    first = working_size(*image.shape[-2:], PIXELS)
    height, width = (round(side / 32) * 32 for side in first)
    assert (height, width) != first
    shown = F.interpolate(image[None], first, mode="bicubic", antialias=True).clamp(0, 1)
    shown = F.interpolate(shown, (height, width), mode="bicubic", antialias=True).clamp(0, 1)[0]
    tokenizer = marked_tokenizer()
    words = files("diffalign.rewards").joinpath("templates/hpsv3_plus_plus.txt").read_text().replace("$prompt", str(prompt))
    picture = "<|image_pad|>" * (height * width // 32**2)
    text = f"<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{words}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    (place,) = (ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().flatten().tolist()
    with torch.no_grad():
        read = made[1].model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=rows_of_patches(2 * shown - 1, 16),
            image_grid_thw=torch.tensor([[1, height // 16, width // 16]]),
            mm_token_type_ids=(ids == made[1].config.image_token_id).int(),
        )
    return read.last_hidden_state[0, place]


def head_by_hand(head, hidden, iteration):
    def linear(name, values):
        return head[f"{name}.weight"] @ values + head[f"{name}.bias"]

    ability = torch.sigmoid(linear("cap_encoder.out_proj", linear("cap_encoder.proj", hidden)))
    condition = torch.stack([ability[0], torch.tensor(iteration)])
    condition = linear("cond_encoder.2", F.gelu(linear("cond_encoder.0", condition)))
    film = linear("film_gen.2", linear("film_gen.0", condition).clamp(min=0))
    hidden = hidden * (1 + film[:WIDTH]) + film[WIDTH:]
    hidden = linear("rm_head.3", linear("rm_head.0", hidden).clamp(min=0)).clamp(min=0)
    return linear("rm_head.5", hidden)[0]


def test_it_is_the_mean_that_the_conditioned_head_reads_at_its_token(made, monkeypatch):
    """Batches whose prompts differ in length; pictures, prompts and the iteration all count; a number of images at once does not."""
    monkeypatch.setattr("diffalign.rewards.hpsv3_plus_plus.PIXELS", PIXELS)
    images = noise(2, 40, 56)[[0, 0, 1]]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    hidden = [hidden_by_hand(made, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    expected = {iteration: torch.stack([head_by_hand(made[2], each, iteration) for each in hidden]) for iteration in (0.0, 0.3, 1.0)}
    scorer = reward(made[0], batch=2)
    torch.testing.assert_close(scorer(images, prompts), expected[0.0], rtol=1e-5, atol=1e-5)
    assert float((expected[0.0][1:] - expected[0.0][0]).abs().min()) > 0.01
    assert float((expected[0.3] - expected[1.0]).abs().min()) > 0.01
    ramp = IterationRamp(scorer)
    for step, iteration in ((0, 0.3), (10, 1.0)):
        marks = score({"ramp": ramp}, images[:1], prompts[:1], torch.zeros(1, dtype=torch.long), Progress(step, 11))["ramp"]
        torch.testing.assert_close(marks, expected[iteration][:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ramp(images[1:2], prompts[1:2]), expected[0.0][1:2], rtol=1e-5, atol=1e-5)


def test_the_picture_is_counted_by_rows_and_columns_and_the_text_goes_on_behind_it():
    places = counted(torch.tensor([[7, 7, 9, 9, 9, 9, 9, 9, 7, 7]] * 2), 9, 2, 3)
    assert places.shape == (3, 2, 10)
    assert places[:, 1].tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(("size", "expected"), [((448, 448), (448, 448)), ((308, 616), (320, 608)), ((28, 7168), (32, 7168))])
def test_pictures_are_resized_again_to_multiples_of_32(size, expected):
    assert multiples(*size) == expected


def test_a_prompt_with_a_token_of_the_model_is_refused(made):
    scorer = reward(made[0])
    for token in ("<|Reward|>", *OWN):
        said = f"HPSv3PlusPlus cannot read the prompt 'a {token}': {token} is a token of the model's own"
        with pytest.raises(ValueError, match=re.escape(said)):
            scorer(noise(1, 28, 28), [Prompt(f"a {token}")])


@pytest.mark.parametrize("iteration", [-0.1, 1.5, float("nan")])
def test_an_iteration_is_a_share(iteration, made):
    with pytest.raises(ValueError, match="'iteration' must be"):
        HPSv3PlusPlus(iteration=iteration)
    with pytest.raises(ValueError, match="'end' must be"):
        IterationRamp(None, end=iteration)


def test_what_is_no_checkpoint_of_it_is_refused(made):
    complete = torch.load(made[0] / "hpsv3++.pth", weights_only=True)

    def refused(change):
        tensors = dict(complete)
        change(tensors)
        with pytest.raises(ConfigError) as caught:
            hpsv3_plus_plus_network(tensors, "HPSv3PlusPlus.weights", torch.float32, 0)
        return str(caught.value)

    ranks = "HPSv3PlusPlus.weights must hold rm_head.0, rm_head.3 and rm_head.5; it is no checkpoint of HPSv3++"
    assert refused(lambda tensors: tensors.pop("rm_head.3.weight")) == ranks
    assert "must hold cap_encoder.proj" in refused(lambda tensors: tensors.pop("cap_encoder.proj.weight"))
    assert "(head) lacks 'film_gen.2.bias'" in refused(lambda tensors: tensors.pop("film_gen.2.bias"))
    assert "has an unknown 'more.weight'" in refused(lambda tensors: tensors.update({"more.weight": torch.zeros(1)}))
    assert "(model) lacks 'language_model.norm.weight'" in refused(lambda tensors: tensors.pop("model.language_model.norm.weight"))
    assert "lacks 'visual.pos_embed.weight'; it is no" in refused(lambda tensors: tensors.pop("model.visual.pos_embed.weight"))
    smaller = refused(lambda tensors: [tensors.pop(name) for name in list(tensors) if "blocks.24." in name])
    assert "must have more than 24 layers in its image tower, as Qwen3-VL-8B has; it has 24." in smaller


def test_what_is_missing_is_one_message(made, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"HPSv3PlusPlus\.tokenizer must be .* And HPSv3PlusPlus\.weights must be a folder that holds"):
        HPSv3PlusPlus(str(tmp_path), tokenizer="/nowhere")
    larger = qwen_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": [*OWN, "<|more|>"]})
    larger.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"HPSv3PlusPlus\.tokenizer must have at most \d+ tokens, and <\|Reward\|> as one more"):
        HPSv3PlusPlus(str(made[0]), tokenizer=str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_vl.modeling_qwen3_vl", None)
    with pytest.raises(ConfigError, match=r"HPSv3PlusPlus needs Qwen3-VL, which transformers has from 4\.57 on; installed is \d"):
        HPSv3PlusPlus(str(made[0]), tokenizer=str(made[0]))


def test_every_tensor_of_the_published_checkpoint_finds_its_place():
    network = hpsv3_plus_plus_network(published("hpsv3++.pth"), "HPSv3PlusPlus.weights", torch.bfloat16, 151655)
    text, vision = network["reader"].config.text_config, network["reader"].config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers) == (32, 8, 36)
    assert (vision.depth, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size) == (27, 1152, 4304, 4096)
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert {parameter.dtype for parameter in network["head"].parameters()} == {torch.float32}
