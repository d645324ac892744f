"""docs/adapters.md: a new family is one class, in one place, and adding it touches no other file."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import autoencoder, t5

from diffalign import AlignmentLoop, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.diffusers import families
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

GUIDE = Path(__file__).parents[2] / "docs" / "adapters.md"
ADAPTER, CHECK = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-aura-flow")
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        vae=autoencoder(shift=None),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.7),
    ).save_pretrained(path)
    return str(path)


def test_the_example_of_the_guide_is_found_by_its_class_alone(folder, tmp_path, monkeypatch):
    assert len(ADAPTER.splitlines()) < 120
    with pytest.raises(ValueError, match=r"is a AuraFlowPipeline, and no adapter serves that class.*docs/adapters.md"):
        FlowMatchingPolicy.from_pretrained(folder, device="cpu")
    (tmp_path / "aura_flow.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("aura_flow")
    try:
        policy = FlowMatchingPolicy.from_pretrained(folder, lora=LoRA(rank=2), device="cpu")
        assert type(policy.family) is module.AuraFlow
        names: dict = {}
        exec(compile(CHECK, str(GUIDE), "exec"), names)
        monkeypatch.setattr(DiffusionPipeline, "progress_bar", lambda self, total: __import__("contextlib").nullcontext(_Silent()))
        assert names["difference"](folder, guidance_scale=1.0, height=32, width=32) < 1e-4
        prompts = [Prompt("a red cube"), Prompt("a cat")]
        loop = AlignmentLoop(SoftmaxTB(policy), TreeSampler(4, FixedPlan((1, 2), 2)), channel_reward, Prompts(prompts), check_rows=10)
        loop.run(2)
        policy.save_lora(str(tmp_path / "lora"))
        assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    finally:
        module.AuraFlow.pipelines = ()  # classes cannot be forgotten: other tests must not find it
        del sys.modules["aura_flow"]


class _Silent:
    def update(self):
        pass


def test_a_family_of_ones_own_comes_before_that_of_the_package():
    kinds = [family.__module__.startswith("diffalign.") for family in families()]
    assert kinds == sorted(kinds)


def test_every_adapter_is_small_and_in_the_guides_table():
    text = GUIDE.read_text()
    for family in families():
        if family.__module__.startswith("diffalign."):
            assert len(Path(sys.modules[family.__module__].__file__).read_text().splitlines()) <= 120
            assert f"`{family.__name__}`" in text


def test_an_unknown_pipeline_is_refused_with_those_known(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MarigoldDepthPipeline", "_diffusers_version": "0.36.0"}))
    with pytest.raises(ValueError, match=r"Known: .*FluxPipeline.*SanaPipeline.*ZImagePipeline.*write your own adapter: docs/adapters.md"):
        FlowMatchingPolicy.from_pretrained(str(tmp_path), device="cpu")
