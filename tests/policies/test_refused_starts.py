"""What a run cannot start at is refused by name, and nothing is passed over in silence."""

import copy
import functools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starts import WRITERS, World, kohya, written

from diffalign.policies import LoRA
from diffalign.policies.diffusers.foreign_names import converted
from diffalign.policies.saved_names import Layers

world = functools.cache(World)
PATH = "transformer_blocks.0.attn.to_q"
NAME = f"transformer.{PATH}"
SETTINGS = {"r": 4, "lora_alpha": 7}


def pairs(*layers, **options):
    return world("sd3").pairs({f"transformer.{layer}": layer for layer in layers or (PATH,)}, **options)


ONES = torch.ones(16)
TENSORS = {
    "DoRA of peft": (pairs() | {f"{NAME}.lora_magnitude_vector": ONES}, r"to_q.lora_magnitude_vector' in .* belongs to DoRA.*fuse_lora"),
    "DoRA of kohya": (pairs() | {f"{NAME}.dora_scale": ONES[:, None]}, r"to_q.dora_scale' in .* belongs to DoRA"),
    "a bias of the update": (pairs() | {f"{NAME}.lora_B.bias": ONES}, r"to_q.lora_B.bias' in .* is added to a layer beside its low-rank"),
    "a bias": (pairs() | {f"{NAME}.bias": ONES}, r"to_q.bias' in .* is added to a layer"),
    "diff": (pairs() | {f"{NAME}.diff": torch.ones(16, 16)}, r"to_q.diff' in .* is added to a layer"),
    "diff_b": (pairs() | {f"{NAME}.diff_b": ONES}, r"to_q.diff_b' in .* is added to a layer"),
    "diff of a norm": (pairs() | {"diffusion_model.norm.diff": ONES}, r"diffusion_model.norm.diff' in .* is added to a layer"),
    "LoKr": (pairs() | {f"{NAME}.lokr_w1": ONES}, r"to_q.lokr_w1' in .* is not understood: no matrix of a low-rank update"),
    "LoHa": ({f"{NAME}.hada_w1_a": ONES}, r"to_q.hada_w1_a' in .* is not understood"),
    "Tucker": (pairs() | {f"{NAME}.lora_mid.weight": ONES}, r"to_q.lora_mid.weight' in .* is not understood"),
    "a whole weight": (pairs() | {f"{NAME}.weight": ONES}, r"to_q.weight' in .* is not understood"),
    "a text encoder": (
        pairs() | {f"text_encoder.layers.0.mlp.fc1.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
        r"text_encoder.layers.0.mlp.fc1.lora_[AB].weight' in .* is for a text encoder",
    ),
    "a text encoder of kohya": (
        pairs() | {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")},
        r"lora_te1_text_model.* is for a text encoder.*Remove these tensors",
    ),
    "a text encoder alone": (
        {"text_encoder.a.lora_A.weight": torch.ones(2, 2), "text_encoder.a.lora_B.weight": torch.zeros(2, 2)},
        r"must hold an update of the denoiser; none of its 2 tensors",
    ),
    "no up": (dict(list(pairs().items())[:1]), r"to_q.lora_A.weight' in .* has no partner"),
    "no down": (dict(list(pairs().items())[1:]), r"to_q.lora_B.weight' in .* has no partner"),
    "halves of two writers": (
        {name.replace("lora_A", "lora_down"): tensor for name, tensor in pairs().items()},
        r"to_q.lora_down.weight' and 'transformer.transformer_blocks.0.attn.to_q.lora_B.weight' in .* are no pair",
    ),
    "an alpha alone": (pairs() | {"transformer.proj_out.alpha": torch.tensor(1.0)}, r"proj_out.alpha' in .* has no partner"),
    "an alpha for some": (
        pairs(PATH, "proj_out") | {f"{NAME}.alpha": torch.tensor(1.0)},
        r"an alpha for some layers, but none for that of 'transformer.proj_out.lora_A.weight'",
    ),
    "an alpha of two numbers": (pairs() | {f"{NAME}.alpha": torch.ones(2)}, r"to_q.alpha' in .* must be one number"),
    "no number": (pairs() | {f"{NAME}.lora_B.weight": torch.full((16, 4), float("nan"))}, r"numbers that are not finite"),
    "whole numbers": (pairs() | {f"{NAME}.lora_B.weight": torch.ones(16, 4, dtype=torch.int8)}, r"has type torch.int8"),
    "ranks that differ": (pairs() | {f"{NAME}.lora_B.weight": torch.ones(16, 3)}, r"must be \[rank, in\] and its pair \[out, rank\]"),
    "another size": (pairs() | {f"{NAME}.lora_A.weight": torch.ones(4, 17)}, r"has rank 4 and is 16 x 17, the adapter has rank 12"),
    "another model": (
        pairs() | {f"transformer.layers.0.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
        r"'transformer.layers.0.to_q.lora_A.weight' is for no layer of SD3Transformer2DModel; diffusers converts a name to 'transformer",
    ),
    "two names of a layer": (
        pairs() | {name.replace("transformer.", "diffusion_model.", 1): tensor for name, tensor in pairs().items()},
        r"two updates of 'transformer_blocks.0.attn.to_q': 'diffusion_model.* and 'transformer.transformer_blocks",
    ),
    "two adapters": (
        pairs(between=(".lora_A.one", ".lora_B.one")) | pairs("proj_out", between=(".lora_A.two", ".lora_B.two")),
        r"holds several adapters, one, two",
    ),
    "bare names without alpha": (
        {name.removeprefix("transformer."): tensor for name, tensor in pairs().items()},
        r"does not give the scale of its updates.*Put peft's adapter_config.json beside it",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_read_are_named(case, tmp_path):
    tensors, message = TENSORS[case]
    with pytest.raises(ValueError, match=message) as refused:
        world("sd3").start(written(tmp_path, tensors))
    assert len(str(refused.value)) < 900
    assert "\n" not in str(refused.value)


HEADERS = {
    "DoRA": ({"use_dora": True}, r"setting 'use_dora' = 'True' in 'lora_adapter_metadata' in the header of lora.safetensors"),
    "PiSSA": ({"init_lora_weights": "pissa"}, r"setting 'init_lora_weights' = 'pissa'"),
    "replicas": ({"layer_replication": [[0, 1]]}, r"setting 'layer_replication'"),
    "of later versions": ({"use_moonlight": "full"}, r"setting 'use_moonlight' = 'full' .* is not understood.*fuse_lora"),
    "LoHa": ({"peft_type": "LOHA"}, r"setting 'peft_type' = 'LOHA'"),
    "another rank": ({"r": 5}, r"has rank 4, but rank 5 in 'lora_adapter_metadata'"),
    "an alpha in words": ({"lora_alpha": "much"}, r"setting 'lora_alpha' in .* got 'much'"),
    "a pattern in words": ({"alpha_pattern": {PATH: None}}, r"setting 'alpha_pattern.transformer_blocks.0.attn.to_q' in"),
    "no mapping": ({"rank_pattern": [4]}, r"setting 'rank_pattern' in .* got '\[4\]'"),
    "no pattern": ({"alpha_pattern": {"(": 3}}, r"holds '\(', which is no pattern"),
    "rslora in words": ({"use_rslora": "yes"}, r"setting 'use_rslora' in .* got 'yes'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_settings_that_are_not_read_are_named(case, tmp_path):
    settings, message = HEADERS[case]
    settings = {f"transformer.{name}": value for name, value in {**SETTINGS, **settings}.items()}
    with pytest.raises(ValueError, match=message):
        world("sd3").start(written(tmp_path, pairs(), settings))


@pytest.mark.parametrize(
    "settings",
    [{"x" * 5000: 1}, {"alpha_pattern": {"x" * 5000: None}}, {"alpha_pattern": {"(" * 5000: 3}}, {"alpha_pattern": {"a{99999999999}": 3}}],
)
def test_messages_stay_short_whatever_stands_in_the_header(tmp_path, settings):
    with pytest.raises(ValueError, match=r"LoRA.start: ") as refused:
        world("sd3").start(written(tmp_path, pairs(), {f"transformer.{name}": value for name, value in {**SETTINGS, **settings}.items()}))
    assert len(str(refused.value)) < 1000
    with pytest.raises(ValueError, match=r"must hold settings of the transformer") as refused:
        world("sd3").start(written(tmp_path, pairs(), {"x" * 5000: 4}))
    assert len(str(refused.value)) < 1000


def test_a_name_that_no_layer_can_have_is_not_repeated_whole(tmp_path):
    with pytest.raises(ValueError, match=r"names of tensors must have at most 300 letters.*one of .* has 5000") as refused:
        world("sd3").start(written(tmp_path, {**pairs(), "x" * 5000: torch.ones(1)}))
    assert len(str(refused.value)) < 1000


def test_headers_that_say_nothing_of_the_denoiser_are_refused(tmp_path):
    here = world("sd3")
    with pytest.raises(ValueError, match=r"must hold settings of the transformer.*\(first: 'text_encoder.r'\)"):
        here.start(written(tmp_path, pairs(), {"text_encoder.r": 4}))
    with pytest.raises(ValueError, match=r"setting 'lora_alpha' in"):
        here.start(written(tmp_path, pairs(), {"transformer.r": 4}))
    with pytest.raises(ValueError, match=r"must hold peft's settings by name"):
        here.start(written(tmp_path, pairs(), [4]))
    with pytest.raises(ValueError, match=r"has rank 4, but rank 8 in .* \(peft's, because it does not state r\)"):
        here.start(written(tmp_path, pairs(), {"transformer.lora_alpha": 4}))


def test_sources_that_differ_about_the_scale_are_refused(tmp_path):
    here = world("sd3")
    header = {f"transformer.{name}": value for name, value in SETTINGS.items()}
    with pytest.raises(ValueError, match=r"multiplied by 0.5 according to its alpha, but by 1.75 according to 'lora_adapter_metadata'"):
        here.start(written(tmp_path, pairs(alpha=2), header))
    here.start(written(tmp_path, pairs(alpha=7), header))
    file = written(tmp_path, pairs())
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(
        ValueError, match=r"by 1 according to the usual alpha = rank of such names, but by 1.75 according to .*adapter_config.json"
    ):
        here.start(file)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON"):
        here.start(file)


def test_what_diffusers_would_drop_is_refused(tmp_path):
    here = world("sdxl")
    tensors = WRITERS["kohya, SDXL by its authors' names"][1](here) | kohya(here, "mid_block.resnets.0.conv1", alpha=1)
    with pytest.raises(
        ValueError, match=r"input_blocks_3_1.* is for no layer of UNet2DConditionModel, and diffusers cannot convert"
    ) as refused:
        here.start(written(tmp_path, tensors))
    assert "would be dropped" in str(refused.value)


def test_a_large_file_of_another_model_takes_one_line(tmp_path):
    layers = {f"lora_unet_down_blocks_{block}_attentions_9_transformer_blocks_{n}_attn1_to_q" for block in range(9) for n in range(60)}
    tensors = {f"{layer}.{side}.weight": torch.zeros(1, 1) for layer in layers for side in ("lora_down", "lora_up")}
    for name in ("sd15", "sdxl", "flux-dev", "sd3"):
        with pytest.raises(ValueError, match=r"^LoRA.start: 'lora_unet_down_blocks_.* is for no layer of") as refused:
            world(name).start(written(tmp_path, tensors))
        assert len(str(refused.value)) < 900


def test_broken_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=r"a.safetensors cannot be read as safetensors"):
        world("sd3").start(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"Download files of a hub first: `hf download NAME`"):
        world("sd3").start("someone/lora")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors"):
        world("sd3").start(tmp_path)  # two, and none of a known name


def test_without_a_family_diffusers_own_names_are_read_alone(tmp_path):
    here = world("flux-dev")
    network = copy.deepcopy(here.base)
    with pytest.raises(
        ValueError, match=r"'lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight' is for no layer of FluxTransformer2DModel$"
    ):
        LoRA(start=str(written(tmp_path, WRITERS["kohya, FLUX by its authors' names"][1](here)))).attach(network, ())
    file = written(tmp_path, WRITERS["alphas, FLUX"][1](here))
    LoRA(start=str(file)).attach(network, ())
    torch.testing.assert_close(here.velocity(network), here.elsewhere(file), rtol=0, atol=1e-5)


def test_pipelines_without_lora_convert_nothing():
    with pytest.raises(ValueError, match="object reads no LoRA"):
        converted(object(), None, {"a": torch.ones(2, 2)})


def test_a_flat_name_of_two_layers_names_none():
    network = torch.nn.ModuleDict({"a_b": torch.nn.Linear(2, 2), "a": torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})})
    layers = Layers.of(network, "transformer")
    assert layers.find("lora_unet_a_b") is None
    assert (layers.find("transformer.a_b"), layers.find("base_model.model.a.b")) == ("a_b", "a.b")


WORDS = ("lora_A", "lora_B", "lora_down", "lora_up", "transformer.", "diffusion_model.", "module.", "base_model.model.", "unet.", "_", ".0")
ENDS = (
    ".alpha",
    ".bias",
    ".lora_B.bias",
    ".diff",
    ".diff_b",
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_C.weight",
    ".lora_A.x.weight",
)
VALUES = st.sampled_from([None, True, False, 0, 1, 4, 7, 2.5, "yes", "none", {}, {PATH: 4}, {"to_q": 7}, [1]])


@st.composite
def mutated(draw, tensors, settings):
    """A file with one to three things changed as no writer would."""
    tensors, settings = dict(tensors), dict(settings)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        match draw(st.integers(0, 5)):
            case 0:
                tensors[name.replace(draw(st.sampled_from(WORDS)), draw(st.sampled_from(["", *WORDS])), 1)] = tensors.pop(name)
            case 1:
                every = draw(st.sampled_from(WORDS))
                tensors = {every + key: tensor for key, tensor in tensors.items()}
            case 2:
                stem = name.split(".lora_")[0].removesuffix(".alpha")
                tensors[stem + draw(st.sampled_from(ENDS))] = draw(st.sampled_from([torch.zeros(16), torch.ones(16), torch.tensor(7.0)]))
            case 3:
                settings[draw(st.sampled_from(["transformer.", ""])) + draw(st.sampled_from(["r", "lora_alpha", "use_rslora", *PEFT]))] = (
                    draw(VALUES)
                )
            case 4:
                tensors[name] = draw(
                    st.sampled_from(
                        [
                            tensors[name].reshape(-1),
                            tensors[name].mT.contiguous() if tensors[name].ndim > 1 else torch.ones(2),
                            tensors[name].double(),
                        ]
                    )
                )
            case _:
                del tensors[name]
        if not tensors:
            return tensors, settings
    return tensors, settings


PEFT = ("rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "init_lora_weights")
FULL = {f"transformer.{name}": value for name, value in {**SETTINGS, "target_modules": [PATH, "proj_out"]}.items()}


@given(mutated(pairs(PATH, "proj_out"), FULL))
def test_changed_files_begin_where_diffusers_does_or_are_refused(tmp_path_factory, changed):
    tensors, settings = changed
    here, folder = world("sd3"), tmp_path_factory.mktemp("changed")
    file = written(folder, tensors, settings)
    try:
        mine = here.start(file)
    except ValueError as refused:
        message = str(refused)
    else:
        message = None
    if message is not None:
        assert message.startswith("LoRA")
        assert len(message.splitlines()) <= 20
        return
    try:
        theirs = here.elsewhere(file)
    except Exception:  # diffusers knows fewer names
        theirs = here.plain
    if torch.equal(theirs, here.plain):  # under names that it passes over, the matrices mean what they did
        left = {layer for layer in (PATH, "proj_out") if any(f"{layer}.lora" in name for name in tensors)}
        meant = {name: tensor for name, tensor in pairs(PATH, "proj_out").items() if name.split(".", 1)[1].split(".lora")[0] in left}
        theirs = here.start(written(folder, meant, settings))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_an_empty_matrix_under_foreign_names_is_named():
    with pytest.raises(ValueError, match=r"'layer\.lora_A\.weight' is empty, of shape \[0, 8\]"):
        converted(None, None, {"layer.lora_B.weight": torch.ones(8, 2), "layer.lora_A.weight": torch.zeros(0, 8)})
