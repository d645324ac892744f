"""Changes of a file of adapters: of names, tensors, settings and bytes, as other writers, copies and accidents make them."""

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora_files import HEADER, LoraFile

Change = Callable[[LoraFile, random.Random], None]

PREFIXES = (
    *("module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "transformer.", "unet.", "diffusion_model."),
    *(
        "model.diffusion_model.",
        "model.",
        "network.",
        "lora.",
        "lora_unet_",
        "lycoris_",
        "text_encoder.",
        "transformer_2.",
        "base_model.",
        ".",
    ),
)
WORDS = (
    *(
        "lora_A",
        "lora_B",
        "lora_down",
        "lora_up",
        "lora.down",
        "lora.up",
        "lora_a",
        "LORA_A",
        "lora_A.default",
        "lora_B.default",
        ".weight",
    ),
    *("transformer.", "unet.", "diffusion_model.", "base_model.model.", "lora_unet_", "blocks", "attn", "to_q", "_0_", ".0.", ".", "_", ""),
)
SETTINGS = (
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "bias",
        "lora_bias",
        "fan_in_fan_out",
        "modules_to_save",
    ),
    *("init_lora_weights", "layer_replication", "target_modules", "peft_type", "task_type", "target_parameters", "trainable_token_indices"),
    *(
        "exclude_modules",
        "megatron_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "use_qalora",
        "layers_to_transform",
        "alora_invocation_tokens",
    ),
    *("arrow_config", "lora_dropout", "velora_config", "use_bdlora", "ensure_weight_tying", "scaling", "multiplier"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 4, 7, 2.5, 1e-30, float("nan"), float("inf"), 10**30, "yes", "none", "all", "lora_only", "LORA", "LOHA"),
    *("gaussian", "pissa", {}, [], [1], ["to_q"], {"to_q": 7}, {".*": 2}, {"(": 3}, {"to_q": "x"}, {"to_q": None}, {"to_q": 0}, [[0, 1]]),
)


def _name(made: LoraFile, chance: random.Random) -> str:
    return chance.choice(sorted(made.tensors))


def _stem(name: str) -> str:
    for end in (".lora_", "_lora.", "_lora1.", "_lora2.", ".alpha", ".hada_", ".lokr_"):
        name = name.split(end)[0]
    return name


def prefix_of_all(made: LoraFile, chance: random.Random) -> None:
    prefix = chance.choice(PREFIXES)
    made.tensors = {prefix + name: tensor for name, tensor in made.tensors.items()}


def prefix_of_one(made: LoraFile, chance: random.Random) -> None:
    name = _name(made, chance)
    made.tensors[chance.choice(PREFIXES) + name] = made.tensors.pop(name)


def other_prefix(made: LoraFile, chance: random.Random) -> None:
    old, new = chance.choice(PREFIXES), chance.choice(PREFIXES)
    made.tensors = {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in made.tensors.items()}


def word_of_one(made: LoraFile, chance: random.Random) -> None:
    name = _name(made, chance)
    tensor = made.tensors.pop(name)
    made.tensors[name.replace(chance.choice(WORDS), chance.choice(WORDS), chance.choice((1, -1)))] = tensor


def word_of_all(made: LoraFile, chance: random.Random) -> None:
    old, new = chance.choice(WORDS), chance.choice(WORDS)
    made.tensors = {name.replace(old, new, 1): tensor for name, tensor in made.tensors.items()}


def letter_of_one(made: LoraFile, chance: random.Random) -> None:
    name = _name(made, chance)
    at = chance.randrange(len(name))
    tensor = made.tensors.pop(name)
    made.tensors[name[:at] + chance.choice(("", " ", "X", "0", ".", "_", "é", "\n", name[at].swapcase())) + name[at + 1 :]] = tensor


def twice(made: LoraFile, chance: random.Random) -> None:
    """A layer under a second name, with equal or other numbers."""
    name = _name(made, chance)
    stem, prefix, factor = _stem(name), chance.choice(PREFIXES), chance.choice((1.0, 2.0))
    for each in [each for each in made.tensors if _stem(each) == stem]:
        tensor = made.tensors[each]
        scaled = (tensor.float() * factor).to(tensor.dtype)  # torch does not multiply float8
        made.tensors[prefix + each.partition(".")[2] if chance.random() < 0.5 else prefix + each] = scaled


def lost(made: LoraFile, chance: random.Random) -> None:
    del made.tensors[_name(made, chance)]


def lost_layer(made: LoraFile, chance: random.Random) -> None:
    stem = _stem(_name(made, chance))
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if _stem(name) != stem}


def beside_layer(made: LoraFile, chance: random.Random) -> None:
    """A further tensor at a layer."""
    stem = _stem(_name(made, chance))
    up = next(
        (tensor for name, tensor in made.tensors.items() if _stem(name) == stem and ("lora_B" in name or "up" in name)), torch.ones(16, 2)
    )
    ends = (
        *(".alpha", ".bias", ".lora_B.bias", ".diff", ".diff_b", ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
        *(".lora_mid.weight", ".lora_C.weight", ".hada_w1_a", ".lokr_w1", ".weight", ".scale", ".network_alpha", ".w_norm", ".b_norm"),
        *(
            ".reshape_weight",
            ".set_weight",
            ".lora_embedding_A",
            ".lora_ga",
            ".base_layer.weight",
            ".original_module.weight",
            ".lora_up.bias",
        ),
        *(".lora_A.bias", ".lora_A.other.weight", ".lora_scale", ".rank", ".lora_alpha", ".alphas", ".dora_scale.weight", ".on_input"),
    )
    width = up.shape[:1]  # none, where a change before left a single number
    value: Tensor = chance.choice(
        [torch.zeros(width), torch.ones(width), torch.tensor(7.0), torch.tensor(0.0), torch.tensor(-2.0), torch.ones(1)]
    )
    made.tensors[stem + chance.choice(ends)] = value


def beside_model(made: LoraFile, chance: random.Random) -> None:
    """A tensor for another part, or for none."""
    names = (
        *("iteration", "step", "epoch", "betas", "sigma", "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "emb_params", "clip_g"),
        *(
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "vae.decoder.conv_in.lora_A.weight",
            "diffusion_model.norm.diff",
        ),
        *(
            "text_encoders.clip_l.transformer.x.lora_up.weight",
            "cond_stage_model.x.alpha",
            "te2.x.alpha",
            "bundle_emb.tok.string_to_param.*",
        ),
        *(
            "text_encoder_2.x.lora_B.weight",
            "t5.x.lora_B.weight",
            "llm_adapter.x.lora_B.weight",
            "text_embedding.weight",
            "transformer.x.weight",
        ),
    )
    made.tensors[chance.choice(names)] = chance.choice([torch.zeros(2, 2), torch.ones(2, 2), torch.tensor(3), torch.tensor(0.5)])


def alphas(made: LoraFile, chance: random.Random) -> None:
    """An alpha for every layer, or for some of them."""
    some = chance.random() < 0.3
    value = chance.choice((0.0, 0.5, 1.0, 3.0, 16.0, -1.0, float("nan"), float("inf"), 1e-20))
    for stem in sorted({_stem(name) for name in made.tensors}):
        if not some or chance.random() < 0.5:
            made.tensors[f"{stem}.alpha"] = torch.tensor(value)


def shape(made: LoraFile, chance: random.Random) -> None:
    name = _name(made, chance)
    tensor = made.tensors[name]
    tensor = tensor if tensor.ndim else tensor[None]
    made.tensors[name] = chance.choice(
        [
            *(
                tensor.reshape(-1),
                tensor.reshape(*tensor.shape, 1, 1),
                tensor.reshape(1, *tensor.shape),
                tensor.transpose(0, -1).contiguous(),
            ),
            *(tensor[:0], tensor[:1], tensor[..., :-1], torch.cat([tensor, tensor]), tensor[None]),
        ]
    )


def number(made: LoraFile, chance: random.Random) -> None:
    name = _name(made, chance)
    tensor = made.tensors[name].float()
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    changed = chance.choice(
        [
            *(tensor * 0, tensor * 1e30, tensor * 1e-30, tensor / 0, tensor * float("nan"), -tensor),
            *(tensor.to(kind) for kind in kinds),
        ]
    )
    made.tensors[name] = changed


def type_of_all(made: LoraFile, chance: random.Random) -> None:
    kind = chance.choice((torch.float16, torch.bfloat16, torch.float64))
    made.tensors = {name: tensor.to(kind) for name, tensor in made.tensors.items()}


def factors(made: LoraFile, chance: random.Random) -> None:
    """The two matrices of a layer change places."""
    stem = _stem(_name(made, chance))
    pair = [name for name in sorted(made.tensors) if _stem(name) == stem and name.endswith(".weight")]
    if len(pair) == 2:
        made.tensors[pair[0]], made.tensors[pair[1]] = made.tensors[pair[1]], made.tensors[pair[0]]


def setting(made: LoraFile, chance: random.Random) -> None:
    """A setting that is changed, added or removed."""
    values, component = _settings(made), next((key.split(".")[0] for key in _settings(made)), "transformer")
    name = chance.choice(SETTINGS)
    where = chance.choice((f"{component}.", f"{component}.", f"{component}.", "text_encoder.", ""))
    if made.beside is not None and isinstance(made.beside, dict):
        made.beside = _changed(made.beside, name, chance)
    else:
        made.header = {**made.header, HEADER: json.dumps(_changed(values, where + name, chance))}


def _changed(values: Mapping[str, Any], name: str, chance: random.Random) -> dict[str, Any]:
    left = {key: value for key, value in values.items() if key != name or chance.random() > 0.3}
    return left if len(left) < len(values) else {**values, name: chance.choice(VALUES)}


def _settings(made: LoraFile) -> dict[str, Any]:
    try:
        values = json.loads(made.header.get(HEADER, "{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def header_text(made: LoraFile, chance: random.Random) -> None:
    text = made.header.get(HEADER, "{}")
    at = chance.randrange(len(text))
    broken = text[:at] + chance.choice(("", "}", '"', "\\", "NaN", "[" * 3000)) + text[at + chance.randint(0, 3) :]
    made.header[HEADER] = chance.choice((broken, broken, broken, "", "null", "[]", "3", '"x"', "{}", '{"transformer": {"r": 4}}'))


def header_of_others(made: LoraFile, chance: random.Random) -> None:
    """Notes of kohya and others, which plain diffusers does not read."""
    made.header |= chance.choice(
        [
            {"ss_network_alpha": "99", "ss_network_dim": "1"},
            {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'},
            {"ss_network_module": "networks.dylora"},
            {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"},
            {"software": '{"name": "ai-toolkit"}', "name": "x"},
            {"use_dora": "True"},
            {"lora_alpha": "3"},
            {"networkAlpha": "4"},
        ]
    )


def settings_beside(made: LoraFile, chance: random.Random) -> None:
    full = {"r": chance.choice((1, 2, 4)), "lora_alpha": chance.choice((1, 4, 9))}
    made.beside = chance.choice(
        [full, full, {"lora_alpha": 4}, {}, [], "{", "", "null", {**full, "use_dora": True}, {**full, "bias": "all"}]
    )


CHANGES: tuple[Change, ...] = (
    *(
        prefix_of_all,
        prefix_of_one,
        other_prefix,
        word_of_one,
        word_of_all,
        letter_of_one,
        twice,
        lost,
        lost_layer,
        beside_layer,
        beside_model,
    ),
    *(alphas, shape, number, type_of_all, factors, setting, setting, setting, header_text, header_of_others, settings_beside),
)


def break_bytes(file: Path, chance: random.Random) -> str:
    """Change the bytes of a written file; the name of the change."""
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    kind = chance.choice(("cut", "header", "length", "longer", "flip", "empty", "text"))
    if kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "header":
        at = 8 + chance.randrange(length)
        content[at : at + 1] = chance.choice((b"", b"}", b'"', b"\xff", b"0", b"9"))
    elif kind == "length":
        content[:8] = struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1)))
    elif kind == "longer":
        content += b"\0" * 8
    elif kind == "flip" and len(content) > 8 + length:
        content[8 + length + chance.randrange(len(content) - 8 - length)] ^= 1 << chance.randrange(8)
    elif kind != "flip":
        content = bytearray(b"" if kind == "empty" else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    file.write_bytes(bytes(content))
    return f"bytes: {kind}"
