"""HPSv3 against transformers' whole Qwen2-VL, one picture at a time, and the names of the published checkpoint."""

import re
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import MEAN, STD, noise, published
from tiny_qwen import OWN, marked_tokenizer, qwen_tokenizer, rows_of_patches
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards import HPSv3
from diffalign.rewards.qwen2_vl import patches, working_size

PROMPTS = [Prompt("a red cube"), Prompt("a sign that says $5, in the rain")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Qwen2-VL with a head, saved under the published names, and the same network."""
    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 2, "num_heads": 16},
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    head = torch.nn.Sequential(
        torch.nn.Linear(256, 32), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    ).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))
        tensors[old] = tensor.contiguous().clone()
    tensors |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "HPSv3.safetensors")
    return folder, model, head


def reward(folder, **options):
    return HPSv3(str(folder), tokenizer=str(folder), dtype="float32", **options)


def by_hand(made, image, prompt):
    """One picture through the whole network."""
    _, model, head = made
    height, width = working_size(*image.shape[-2:], 256 * 28 * 28)
    picture = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True).clamp(0, 1)[0]
    picture = (picture - MEAN) / STD
    grid = torch.tensor([[1, height // 14, width // 14]])
    tokenizer = marked_tokenizer()
    words = files("diffalign.rewards").joinpath("templates/hpsv3.txt").read_text().replace("$prompt", str(prompt))
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (height * width // 28**2)
        + f"<|vision_end|>{words}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        seen = model.model.visual(rows_of_patches(picture, 14), grid_thw=grid)
        embeds[ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = getattr(seen, "pooler_output", seen)
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        (place,) = (ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().flatten().tolist()
        return float(head(hidden[0, place])[0])


def test_it_is_the_mean_that_the_head_reads_at_its_token(made):
    """Batches whose prompts differ in length, pictures and prompts that both count."""
    images = noise(2, 40, 56)[[0, 0, 1]]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    expected = torch.tensor([by_hand(made, image, prompt) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(reward(made[0], batch=2)(images, prompts), expected, rtol=1e-3, atol=1e-3)
    assert float((expected[1:] - expected[0]).abs().min()) > 0.01


def test_patches_of_one_token_stand_behind_each_other():
    pixels = torch.arange(2 * 3 * 28 * 56.0).reshape(2, 3, 28, 56)
    flat, grid = patches(pixels)
    assert flat.shape == (2 * 2 * 4, 3 * 2 * 14 * 14)
    assert grid.tolist() == [[1, 2, 4]] * 2
    rows = flat.reshape(2, 2, 2, 2, 3, 2, 14, 14)  # picture, token column, patch row, patch column, channel, frame, y, x
    assert torch.equal(rows[1, 1, 0, 1, 2, 0], pixels[1, 2, :14, 42:56])
    assert torch.equal(rows[..., 0, :, :], rows[..., 1, :, :])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (448, 448)), ((448, 448), (448, 448)), ((64, 64), (448, 448)), ((512, 1024), (308, 616)), ((100, 20), (1008, 224))],
)
def test_pictures_are_resized_as_the_authors_do(size, expected):
    assert working_size(*size, 256 * 28 * 28) == expected


def test_a_sliver_and_a_prompt_with_a_token_of_the_model_are_refused(made):
    with pytest.raises(ValueError, match="at most 1 to 200; got 2 x 401"):
        working_size(2, 401, 200704)
    with pytest.raises(ValueError, match=r"cannot read the prompt 'a <\|Reward\|>': <\|Reward\|> is a token of the model's own"):
        reward(made[0])(noise(1, 28, 28), [Prompt("a <|Reward|>")])
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is a token of the model's own"):
        reward(made[0])(noise(1, 28, 28), [Prompt("a <|image_pad|>")])


def test_what_is_no_checkpoint_of_it_is_refused(made, tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ConfigError, match=r"HPSv3\.weights must hold rm_head\.0, rm_head\.3 and rm_head\.5"):
        HPSv3(str(tmp_path), tokenizer=str(made[0]))
    with pytest.raises(ConfigError, match=r"HPSv3\.tokenizer must be a local folder"):
        HPSv3(str(made[0]), tokenizer="/nowhere")
    larger = qwen_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": [*OWN, "<|more|>"]})
    larger.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"HPSv3\.tokenizer must have at most \d+ tokens, and <\|Reward\|> as one more"):
        HPSv3(str(made[0]), tokenizer=str(tmp_path))


def test_every_tensor_of_the_published_checkpoint_finds_its_place():
    from diffalign.rewards.hpsv3 import hpsv3_network

    network = hpsv3_network(published("HPSv3.safetensors"), "HPSv3.weights", torch.bfloat16)
    text, vision = network["text"].config, network["vision"].config
    assert (text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers) == (28, 4, 28)
    assert (vision.depth, vision.embed_dim, vision.mlp_ratio) == (32, 1280, 4)
    assert not any(buffer.is_meta for buffer in network.buffers())
