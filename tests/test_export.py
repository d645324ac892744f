"""Exported weights of every family: in a process that never heard of diffalign they give the policy's own pictures."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from started import start
from tiny_pipelines import BUILD, saved

from diffalign.core import Euler, Guided, Progress, Prompt, ShiftedGrid, Streams
from diffalign.export import Card, export, pipeline_policy
from diffalign.policies import FlowMatchingPolicy, GaussianMixturePolicy, LoRA, TDMPolicy
from diffalign.policies.diffusers.packing import pack
from diffalign.samplers import DeterministicSampler

ROOT = Path(__file__).parents[1]
PROMPT = "a red cube"
STEPS = 2
PACKED = ("flux-dev", "qwen-image")
LENGTH = {"sd15": None, "sd15-v": None, "sdxl": None, "qwen-image": 256}
UNGUIDED = {"z-image": {"guidance_scale": 0.0}, "qwen-image": {"true_cfg_scale": 1.0}, "flux-dev": {}}
FAMILIES = [name for name in BUILD if name not in ("sd15-v", "flux-schnell")]  # exports do not know what is predicted or given

ELSEWHERE = """
import json, sys
import torch
from diffusers import DiffusionPipeline

for job in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(job["base"])
    pipeline.set_progress_bar_config(disable=True)
    if job["lora"]:
        pipeline.load_lora_weights(job["lora"])
    images = pipeline(prompt=job["prompt"], latents=torch.load(job["latents"]), output_type="pt", **job["options"]).images
    torch.save(images, job["images"])
assert not any(name.startswith("diffalign") for name in sys.modules)
"""


def policy_of(folder, name, lora=LoRA(rank=2, alpha=6)):  # noqa: B008  a frozen value
    policy = FlowMatchingPolicy.from_pretrained(
        folder, lora=lora, resolution=32, max_sequence_length=LENGTH.get(name, 24), device="cpu", kernel=Euler()
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def pictures(policy):
    with torch.no_grad():
        forest = DeterministicSampler(STEPS, samples=1).sample(policy, policy.encode([Prompt(PROMPT)]), Progress(0, 1), Streams(3))
        return policy.decode(forest.samples)


def options_of(name):
    options = {"num_inference_steps": STEPS, "height": 32, "width": 32, **UNGUIDED.get(name, {"guidance_scale": 1.0})}
    if (length := LENGTH.get(name, 24)) is not None:
        options["max_sequence_length"] = length
    return {**options, "use_resolution_binning": False} if name == "sana" else options


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each family with adapters, exported in both forms, and what a process without diffalign makes of them."""
    root, jobs, found = tmp_path_factory.mktemp("exported"), [], {}
    for name in FAMILIES:
        base = saved(tmp_path_factory, name)
        policy = policy_of(base, name)
        noise = Streams(3).normals(policy.latent_shape, "rollout", [0], [0])
        torch.save(pack(noise) if name in PACKED else noise, root / f"{name}.latents")
        card = Card(sampled=STEPS)
        lora, merged = (export(policy, root / f"{name}-{form}", form, card) for form in ("diffusers", "merged"))
        for form, where, adapters in (("base", base, None), ("lora", base, lora), ("merged", merged, None)):
            jobs.append(
                {
                    "base": str(where),
                    "lora": adapters and str(adapters),
                    "prompt": PROMPT,
                    "latents": str(root / f"{name}.latents"),
                    "images": str(root / f"{name}.{form}"),
                    "options": options_of(name),
                }
            )
        found[name] = (policy, pictures(policy), root)
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "elsewhere.py").write_text(ELSEWHERE)
    done = start(root / "elsewhere.py", root / "jobs.json", folder=root, environment={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_elsewhere_are_those_of_the_policy(exported, name, form):
    _, images, root = exported[name]
    torch.testing.assert_close(torch.load(root / f"{name}.{form}"), images, rtol=0, atol=1e-4)
    assert (torch.load(root / f"{name}.base") - images).abs().max() > 1e-3  # the adapters matter, and so does their alpha


CARDS_ELSEWHERE = """
import json, os, re, sys
import torch

for folder, job in json.load(open(sys.argv[1])).items():
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), flags=re.DOTALL)[1]
    if job is None:
        exec(code, {})
        continue
    names = {"latents": torch.load(job["latents"])}
    code = re.sub(r",?\\n?\\)\\.images\\[0\\]", ", latents=latents, output_type='pt').images", code)
    exec(code.replace("a lighthouse at night", job["prompt"]).replace('image.save("picture.png")', ""), names)
    torch.save(names["image"], job["images"])
"""


def student_of(tmp_path_factory, tag=""):
    return TDMPolicy(policy_of(saved(tmp_path_factory, "sd3"), "sd3"), 3, [1.0, 0.9, 0.4, 0.0], tag=tag)


@pytest.fixture(scope="module")
def by_card(exported, tmp_path_factory):
    """What a fresh process draws by the code on each card, and what the policy draws."""
    root, jobs, expected = exported["sd3"][2], {}, {}
    for name in FAMILIES:
        expected[name] = exported[name][1]
        for form in ("diffusers", "merged"):
            jobs[str(root / f"{name}-{form}")] = {"prompt": PROMPT, "latents": str(root / f"{name}.latents"), "images": f"{name}.pt"}
    around = {
        "student": student_of(tmp_path_factory, " in {steps} steps"),
        "guided": Guided(exported["sd3"][0], 3.0, "a blur"),
        "guided-flux": Guided(exported["flux-dev"][0], 3.0, ""),
        "guided-z-image": Guided(exported["z-image"][0], 3.0, ""),
    }
    for name, policy in around.items():
        folder = export(policy, root / name, "diffusers", Card(sampled=STEPS))
        base = {"student": "sd3", "guided": "sd3", "guided-flux": "flux-dev", "guided-z-image": "z-image"}[name]
        jobs[str(folder)] = {"prompt": PROMPT, "latents": str(root / f"{base}.latents"), "images": f"{name}.pt"}
        with torch.no_grad():
            sampler = DeterministicSampler(next(iter(policy.step_counts), STEPS), samples=1)
            forest = sampler.sample(policy, policy.encode([Prompt(PROMPT)]), Progress(0, 1), Streams(3))
            expected[name] = policy.decode(forest.samples)
    embedded = FlowMatchingPolicy.from_pretrained(
        "shapeworld", lora=LoRA(rank=2), grid=ShiftedGrid(2.0), max_sequence_length=16, device="cpu"
    )
    jobs[str(export(embedded, root / "embedded", "diffusers", Card(sampled=STEPS)))] = None
    (root / "cards.json").write_text(json.dumps(jobs))
    (root / "cards.py").write_text(CARDS_ELSEWHERE)
    done = start(root / "cards.py", root / "cards.json", folder=root, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return root, expected


@pytest.mark.parametrize("name", [*FAMILIES, "student", "guided", "guided-flux", "guided-z-image"])
def test_the_code_on_a_card_draws_what_the_policy_draws(by_card, name):
    root, expected = by_card
    for form in ("diffusers", "merged") if name in FAMILIES else ("",):
        folder = root / (f"{name}-{form}" if form else name)
        torch.testing.assert_close(torch.load(folder / f"{name}.pt"), expected[name], rtol=0, atol=2e-4)


def test_the_code_on_the_card_of_the_embedded_pipeline_runs_as_it_is(by_card):
    from PIL import Image

    folder = by_card[0] / "embedded"
    assert Image.open(folder / "picture.png").size == (64, 64)
    code = (folder / "README.md").read_text()
    for expected in (
        "num_inference_steps=2",
        "guidance_scale=1,",
        "max_sequence_length=16",
        "sigmas=[1, 0.666667]",
        'SHAPEWORLD / "model"',
    ):
        assert expected in code


def test_a_card_that_cannot_be_written_costs_no_weights(exported, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no words")

    monkeypatch.setattr("diffalign.export.card.usage", broken)
    export(exported["sd3"][0], tmp_path, "diffusers")
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert "model card" in capsys.readouterr().err


# names that ComfyUI's loader accepts for the layers of each family
COMFYUI = {
    "sd3": "transformer.transformer_blocks.0.attn.to_q",
    "flux-dev": "transformer.transformer_blocks.0.ff_context.net.0.proj",
    "flux2-klein": "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "z-image": "transformer.layers.0.attention.to_out.0",
    "qwen-image": "transformer.transformer_blocks.0.attn.add_q_proj",
    "sd15": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
}


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_gets_the_same_change_of_weights_under_its_own_names(exported, name, tmp_path):
    policy, _, root = exported[name]
    tensors = load_file(export(policy, tmp_path, "comfyui") / "comfyui_lora.safetensors")
    names = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in tensors}
    assert COMFYUI[name] in names
    assert len(tensors) == 3 * len(names)
    kind = "lora_down", "lora_up"
    kind = kind if name in ("sd15", "sdxl") else ("lora_A", "lora_B")
    base = DiffusionPipeline.from_pretrained(saved_base(policy)).components[policy.family.component].state_dict()
    merged = DiffusionPipeline.from_pretrained(root / f"{name}-merged").components[policy.family.component].state_dict()
    changed = 0
    for key, weight in base.items():
        path = key.removesuffix(".weight")
        path = f"transformer.{path}" if kind[0] == "lora_A" else "lora_unet_" + path.replace(".", "_")
        delta = torch.zeros_like(weight)
        if path in names:
            down, up = tensors[f"{path}.{kind[0]}.weight"], tensors[f"{path}.{kind[1]}.weight"]
            delta, changed = tensors[f"{path}.alpha"] / len(down) * up @ down, changed + 1  # as ComfyUI adds it
        torch.testing.assert_close(weight + delta, merged[key], rtol=0, atol=1e-5)
    assert changed == len(names)


def saved_base(policy):
    return policy.family.folder


def test_comfyui_is_refused_for_a_family_that_it_does_not_run(exported, tmp_path):
    with pytest.raises(ValueError, match="ComfyUI does not run the family Sana; export it as diffusers or merged"):
        export(exported["sana"][0], tmp_path, "comfyui")


def test_wrappers_are_looked_through_and_other_policies_refused(exported, tmp_path):
    policy = exported["sd3"][0]
    assert pipeline_policy(Guided(policy, 2.0)) is policy
    mixture = GaussianMixturePolicy([[0.0]], 1.0)
    assert pipeline_policy(mixture) is None
    with pytest.raises(ValueError, match="can be exported; got GaussianMixturePolicy"):
        export(mixture, tmp_path, "diffusers")
    with pytest.raises(ValueError, match="format must be one of diffusers, comfyui, merged; got 'onnx'"):
        export(policy, tmp_path, "onnx")


def test_weights_that_were_all_trained_are_only_merged(tmp_path_factory, tmp_path):
    policy = policy_of(saved(tmp_path_factory, "sd3"), "sd3", lora=None)
    for form in ("diffusers", "comfyui"):
        with pytest.raises(ValueError, match="it has no LoRA; export it with --format merged"):
            export(policy, tmp_path / form, form)
    export(policy, tmp_path / "merged", "merged")
    again = FlowMatchingPolicy.from_pretrained(str(tmp_path / "merged"), resolution=32, max_sequence_length=24, device="cpu")
    for name, parameter in again.network.named_parameters():
        assert torch.equal(parameter, dict(policy.network.named_parameters())[name])
    assert all(parameter.requires_grad for parameter in policy.network.parameters())


def test_a_half_precision_base_is_merged_in_its_own_precision(tmp_path_factory, tmp_path):
    folder = saved(tmp_path_factory, "z-image")
    policy = FlowMatchingPolicy.from_pretrained(folder, lora=LoRA(rank=2), dtype="bfloat16", resolution=32, device="cpu")
    export(policy, tmp_path, "merged")
    tensors = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("lora" in name or "base_layer" in name for name in tensors)


def test_the_card_says_what_is_known(exported, tmp_path):
    policy = exported["flux-dev"][0]
    config = {"objective": {"class_path": "diffalign.objectives.softmax_tb.SoftmaxTB"}, "sampler": {"class_path": "a.TreeSampler"}}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**config, "rewards": {"pick": {"class_path": "PickScore"}, "ocr": "x.y"}}, sort_keys=False)
    )
    lines = [{"step": step, "reward": step / 10, "diversity/l_gmd": 0.5, "seconds/rollout": 1.0} for step in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = Card.of_run(tmp_path, 30)
    assert (card.objective, card.sampler, card.rewards, card.steps) == ("SoftmaxTB", "TreeSampler", ("pick", "ocr"), 30)
    assert card.measured == (("reward", "0.4500", "2.4500"), ("diversity/l_gmd", "0.5000", "0.5000"))
    assert "not held out" in card.source
    entries = [
        {"step": step, "samples": 4, "rewards": {"pick": step / 100}, "diversity": {"l_gmd": 0.25}, "by_prompt": [{}] * 3}
        for step in (0, 30)
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps(entries))
    card = Card.of_run(tmp_path, 30)
    assert card.measured == (("reward pick", "0.0000", "0.3000"), ("diversity l_gmd", "0.2500", "0.2500"))
    text = card.text(policy, "diffusers")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == policy.family.source
    assert "lora" in front["tags"]
    for expected in ("FluxPipeline", "SoftmaxTB", "pick, ocr", "| training steps | 30 |", "| reward pick | 0.0000 | 0.3000 |"):
        assert expected in text
    assert "not stated in the base's folder" in text
    assert "load_lora_weights" in text
    assert "Nothing was measured" in Card().text(policy, "merged")


@pytest.mark.parametrize(("evaluation", "drawn"), [({"steps": 6}, 6), ({"steps": None}, 28), ({}, 10)])
def test_the_card_draws_with_the_steps_of_the_evaluation(tmp_path, evaluation, drawn):
    config = {"evaluation": {"class_path": "a.B", "init_args": evaluation}, "sampler": {"class_path": "a.C", "init_args": {"steps": 10}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert Card.of_run(tmp_path).sampled == drawn


def test_a_card_has_no_before_of_other_prompts_or_settings(tmp_path):
    def entry(step, prompts, scored, seed=0):
        rows = [{"prompt": prompt, "rewards": {"pick": 0.5} if prompt in scored else {}, "diversity": {"l_gmd": 0.0}} for prompt in prompts]
        return {
            "step": step,
            "samples": 4,
            "steps": 2,
            "seed": seed,
            "rewards": {"pick": 0.5},
            "diversity": {"l_gmd": 0.0},
            "by_prompt": rows,
        }

    said = "; before is empty where prompts or settings were others"
    for first, before in (
        (entry(0, "abc", "ab"), ["0.5000", "0.0000"]),
        (entry(0, "abc", "bc"), ["", "0.0000"]),
        (entry(0, "xyz", "xy"), ["", ""]),
        (entry(0, "abc", "ab", seed=1), ["", ""]),
    ):
        (tmp_path / "evaluation.json").write_text(json.dumps([first, entry(30, "abc", "ab")]))
        card = Card.of_run(tmp_path, 30)
        assert [row[1] for row in card.measured] == before
        assert card.source.endswith(said) == ("" in before)


LAUGHS = "l0: &l0 [ha]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 12))
CARDS = {
    "aliases without end": (f"---\n{LAUGHS}license: *l11\n---\n".encode(), ""),
    "a rule in the text": (b"# My fine-tune\n\n---\n\n**Use it** with 28 steps.\n\n* sampler: *Euler*\n", ""),
    "a rule, then a table": (b"# X\n\n---\n| a | b |\n|---|---|\n", ""),
    "no end": (b"---\nlicense: mit\n", ""),
    "an open list": (b"---\nlicense: mit\ntags: [a, b\n---\n# X\n", "the licence of the base cannot be read"),
    "a title with a colon": (b"---\nlicense: other\ntitle: Foo: a bar\n---\n# X\n", "the licence of the base cannot be read"),
    "good": (b"---\nlicense: mit\n---\n# X\n", "mit"),
    "CRLF and a byte order mark": (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# X\r\n", "mit"),
    "latin-1": (b"---\nlicense: mit\n---\nMod\xe8le fran\xe7ais\n", "mit"),
    "several": (b"---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
    "a name of two lines": (b"---\nlicense_name: |\n  our\n  own | terms\n---\n", "our own / terms"),
    "a date that is none": (b"---\nlicense: mit\ndate: 2024-13-45\n---\n", "the licence of the base cannot be read"),
    "no mapping": (b"---\n- license\n---\n", ""),
    "empty": (b"", ""),
}


@pytest.mark.parametrize(("content", "expected"), CARDS.values(), ids=CARDS)
def test_a_base_with_a_readme_of_any_shape_is_exported(tmp_path, tmp_path_factory, capsys, content, expected):
    shutil.copytree(saved(tmp_path_factory, "flux-dev"), tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(content)
    policy = FlowMatchingPolicy.from_pretrained(
        str(tmp_path / "base"), lora=LoRA(rank=2), resolution=32, max_sequence_length=24, device="cpu"
    )
    texts = [Card().text(policy, "diffusers") for _ in range(2)]
    said = capsys.readouterr().err
    row = next(line for line in texts[0].splitlines() if "licence of the base" in line)
    if expected.startswith("the licence"):
        assert said.count(expected) == 1  # once, however often the card is written
        assert "not stated" in row
    else:
        assert "licence" not in said
        assert (expected or "not stated") in row
    assert yaml.safe_load(texts[0].split("---")[1])["base_model"]


def test_the_licence_of_the_base_is_that_of_its_own_card(tmp_path):
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=2), max_sequence_length=16, device="cpu")
    text = Card().text(policy, "diffusers")
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert re.search(r"licence of the base \| apache-2.0", text)


def test_a_card_is_made_of_metrics_that_some_steps_lack_and_of_a_line_that_was_cut_off(tmp_path):
    lines = [{"step": 0, "reward": 1.0, "reward/ocr": 0.5}, {"step": 1, "reward": 3.0, "reward/pick": 2.0, "reward/ocr": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "rew')
    measured = Card.of_run(tmp_path).measured
    assert measured == (("reward", "1.0000", "3.0000"), ("reward/pick", "", "2.0000"), ("reward/ocr", "0.5000", "0.7000"))
