"""The run for one small card: its settings on a tiny random pipeline, trained for two steps and exported."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.policies.diffusers import is_quantized

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = EXAMPLES / "flux1_tmpo_24gb.yaml"


@pytest.fixture
def tiny(tmp_path, tmp_path_factory, monkeypatch):
    """What takes the run's weights, prompts and reward to something tiny; its settings stay."""
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo cats\n")
    (tmp_path / "small_card_rewards.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    policy = {"path": saved(tmp_path_factory, "flux-dev"), "resolution": 32, "max_sequence_length": 24, "dtype": "float32", "device": "cpu"}
    words = [word for name, value in policy.items() for word in (f"--policy.{name}", str(value))]
    return [*words, "--rewards.pickscore=small_card_rewards.red", "--prompts.path", "prompts.txt", "--evaluation", "null"]


def test_the_run_trains_adapters_of_a_quantised_base_and_exports_them(tiny, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="needs pip install 'diffalign[quantized]'")
    folder = tmp_path / "run"
    assert main(["train", str(RUN), *tiny, "--total", "2", "--folder", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["contract/deviation"] < 1e-4 for line in lines)
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert main(["export", str(folder), "--format", "merged"]) == 2
    assert "the base is quantised" in capsys.readouterr().err
    assert main(["export", str(folder), "--format", "merged", "--policy.quantization", "null"]) == 0
    assert (folder / "export" / "merged" / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_everything_that_saves_memory_is_on(tiny, capsys):
    assert main(["check", str(RUN), *tiny, "--memory", "24"]) == 0
    assert "27" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("leaves per prompt"))
    loop = config.parse(RUN, tiny).build()
    policy = loop.objective.policy
    assert is_quantized(policy.network)
    assert policy.network.is_gradient_checkpointing
    assert policy.family.setting.offload
    assert policy.family.pipeline.vae.use_slicing
    assert policy.encodings.folder is not None
    assert (loop.sampler.rows, loop.objective.rows, loop.prompts_per_step) == (4, 2, 1)


def test_what_differs_from_the_papers_run_is_what_saves_memory():
    def flat(tree, path=""):
        if not isinstance(tree, dict):
            return {path: tree}
        return {name: value for key, inner in tree.items() for name, value in flat(inner, f"{path}.{key}").items()}

    small, paper = (flat(yaml.safe_load(file.read_text())) for file in (RUN, EXAMPLES / "flux1_tmpo_pickscore.yaml"))
    changed = {name.rpartition(".")[2] for name in small.keys() | paper.keys() if small.get(name) != paper.get(name)}
    assert changed == {"quantization", "slicing", "rank", "alpha", "rows", "prompts_per_step", "chunk", "samples"}


def test_the_header_says_what_was_not_measured():
    header = RUN.read_text().partition("\npolicy:")[0]
    for word in ("arXiv:2605.10983", "reports", "Needs:", "Hardware:", "estimate", "train examples/flux1_tmpo_24gb.yaml"):
        assert word in header
