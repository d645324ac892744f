"""Sizes per prompt: what is drawn together, trained, resumed, evaluated and refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import saved

from diffalign import AlignmentLoop, Prompt
from diffalign.cli import main
from diffalign.core import ConfigError
from diffalign.evaluation import evaluate
from diffalign.evaluation.pictures import on_canvas
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts, read_prompts
from diffalign.samplers import ChainSampler
from diffalign.testing import channel_reward

SIZES = [None, (32, 64), (64, 32), (48, 48)]
RUN = """
policy:
  class_path: FlowMatchingPolicy.from_pretrained
  init_args: {{path: {path}, resolution: 32, lora: {{rank: 2}}, device: cpu, max_sequence_length: 24}}
objective: SoftmaxTB
sampler:
  class_path: TreeSampler
  init_args: {{steps: 3, plan: {{class_path: FixedPlan, init_args: {{splits: [0, 1], branches: 2}}}}}}
rewards: diffalign.testing.channel_reward
prompts: {{class_path: PromptFile, init_args: {{path: prompts.jsonl}}}}
prompts_per_step: 2
total: 4
evaluation: {{class_path: HeldOutEvaluation, init_args: {{prompts: prompts.jsonl, samples: 2, steps: 2}}}}
"""


def sized(text, size):
    return Prompt(text, {} if size is None else {"height": size[0], "width": size[1], "kind": text})


def lines(*sizes):
    prompts = [sized(f"prompt {place}", size) for place, size in enumerate(sizes)]
    return "".join(json.dumps({"prompt": prompt, **prompt.metadata}) + "\n" for prompt in prompts)


@pytest.fixture
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN.format(path=saved(tmp_path_factory, "flux-dev")))
    (tmp_path / "prompts.jsonl").write_text(lines(None, (32, 64), None, (64, 32), (32, 64)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_a_step_has_one_size_and_every_prompt_its_turn(sizes, count, seed, shuffle):
    prompts = [sized(str(place), size) for place, size in enumerate(sizes)]
    source = Prompts(prompts, seed, shuffle)
    for start in (0, 2 * len(prompts)):
        steps = [source.draw(step, count) for step in range(start, start + len(prompts))]
        assert all(len(drawn) == count and len({prompt.size for prompt in drawn}) == 1 for drawn in steps)
        assert Counter(str(prompt) for drawn in steps for prompt in drawn) == {str(prompt): count for prompt in prompts}
        assert [Prompts(prompts, seed, shuffle).draw(step, count) for step in range(start, start + len(prompts))] == steps


def test_buckets_take_turns_in_the_order_of_the_list():
    source = Prompts([sized("a", None), sized("b", (8, 8)), sized("c", None), sized("d", None)], shuffle=False)
    assert [source.draw(step, 2) for step in range(5)] == [["a", "c"], ["b", "b"], ["d", "a"], ["c", "d"], ["a", "c"]]
    assert source.draw(1, 2)[0].size == (8, 8)


def test_shuffled_buckets_change_from_round_to_round():
    source = Prompts([sized(str(place), SIZES[place % 2]) for place in range(12)])
    rounds = [[source.draw(12 * number + step, 1)[0].size for step in range(12)] for number in range(3)]
    assert len({tuple(sizes) for sizes in rounds}) == 3


@pytest.mark.parametrize("extra", ['"height": 64', '"height": 64, "width": "64"', '"height": 0, "width": 64', '"height": 6.5, "width": 64'])
def test_a_size_that_is_none_is_refused_with_its_line(tmp_path, extra):
    file = tmp_path / "list.jsonl"
    file.write_text('"a"\n{"prompt": "b", ' + extra + "}\n")
    with pytest.raises(ConfigError, match=r"list.jsonl, line 2: a prompt's height and width must both be whole numbers of pixels; 'b' has"):
        read_prompts(str(file))


def test_a_run_over_sizes_trains_and_resumes_exactly(workplace, capsys):
    assert main(["train", "run.yaml", "--folder", "whole"]) == 0
    assert main(["train", "run.yaml", "--folder", "parts", "--total", "2"]) == 0
    assert main(["train", "run.yaml", "--folder", "parts", "--resume", "--new-total"]) == 0
    written, again = (load_file(f"{folder}/lora/pytorch_lora_weights.safetensors") for folder in ("whole", "parts"))
    assert any(tensor.abs().max() > 0 for name, tensor in written.items() if "lora_B" in name)
    assert all(torch.equal(written[name], again[name]) for name in written)
    metrics = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert all(line["contract/deviation"] < 1e-4 for line in metrics)
    sizes = {prompt.size for step in range(4) for prompt in Prompts(read_prompts("prompts.jsonl")).draw(step, 2)}
    assert len(sizes) > 1  # or the test would say nothing
    for step in (0, 4):  # a canvas of 64 x 64 holds all three shapes
        assert Path(f"whole/images/step-{step:06d}.png").exists()
    capsys.readouterr()
    assert main(["sample", "whole", "--prompt", "a", "--n", "1", "--steps", "2", "--size", "32", "64", "--out", "wide.png"]) == 0
    assert main(["sample", "whole", "--prompt", "a", "--n", "1", "--steps", "2", "--size", "64", "32", "--out", "tall.png"]) == 0
    wide, tall = Image.open("wide.png"), Image.open("tall.png")
    assert wide.width > tall.width
    assert wide.height < tall.height
    capsys.readouterr()
    assert main(["sample", "whole", "--prompt", "a", "--size", "32", "34", "--out", "odd.png"]) == 2
    assert "error: --size: resolution must have sides divisible by 4" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["prompts", "evaluation.prompts"])
def test_a_size_that_cannot_be_drawn_is_refused_when_the_run_is_built(workplace, capsys, key):
    Path("odd.jsonl").write_text(lines(None, (32, 64), (32, 34)))
    option = "--prompts.path" if key == "prompts" else f"--{key}"
    assert main(["check", "run.yaml", option, "odd.jsonl"]) == 2
    assert capsys.readouterr().err == (
        f"error: {key}: the prompt 'prompt 2' has a size that cannot be drawn: "
        "resolution must have sides divisible by 4 for a FluxPipeline; got 32 x 34 (height x width)\n"
    )


def test_in_python_too_such_a_size_is_refused_when_the_loop_is_built(tmp_path_factory):
    policy = FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, "flux-dev"), lora=LoRA(rank=2), resolution=32, device="cpu")

    def looped(*sizes):
        prompts = [sized(f"prompt {place}", size) for place, size in enumerate(sizes)]
        return AlignmentLoop(SoftmaxTB(policy), ChainSampler(3, samples=2), channel_reward, prompts, prompts_per_step=1)

    looped(None, (32, 64))
    with pytest.raises(ValueError, match=r"the prompt 'prompt 2' has a size that cannot be drawn: resolution must .*; got 32 x 34"):
        looped(None, (32, 64), (32, 34))


def test_an_evaluation_over_sizes_is_that_of_each(tmp_path_factory):
    folder = saved(tmp_path_factory, "flux-dev")
    policy, wide = (FlowMatchingPolicy.from_pretrained(folder, resolution=size, device="cpu") for size in (32, [32, 64]))
    sizes = [None, (32, 64), None, (32, 64)]
    texts = ["a", "bb", "ccc", "dddd"]
    settings = {"rewards": {"near": channel_reward}, "samples": 2, "steps": 2, "pictures": 3}
    mixed = evaluate(policy, [sized(text, size) for text, size in zip(texts, sizes, strict=True)], **settings)
    plain, broad = (evaluate(each, [Prompt(text) for text in texts], **settings) for each in (policy, wide))
    for name, values in mixed.measures().items():
        one, other = plain.measures()[name], broad.measures()[name]
        expected = torch.stack([one[0], other[1], one[2], other[3]])
        assert torch.allclose(values, expected, atol=1e-5), name
    assert mixed.images.shape == (3, 2, 3, 32, 64)
    assert torch.allclose(mixed.images[1], broad.images[1], atol=1e-5)
    assert torch.allclose(mixed.images[2][..., :32], plain.images[2], atol=1e-5)
    assert (mixed.images[2][..., 32:] == 1).all()


def test_a_picture_larger_than_its_canvas_is_scaled_down_whole():
    picture = torch.zeros(1, 3, 40, 80)
    placed = on_canvas(picture, (30, 40))
    assert placed.shape == (1, 3, 30, 40)
    assert (placed[..., :20, :] == 0).all()
    assert (placed[..., 20:, :] == 1).all()
