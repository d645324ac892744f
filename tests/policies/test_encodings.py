"""Texts are encoded once: in a run, and with a folder in all runs."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipelines import saved

from diffalign.core import Guided, Prompt
from diffalign.policies import FlowMatchingPolicy, LoRA, encodings
from diffalign.policies.encodings import Encodings, encoder_revision

PROMPTS = [Prompt("a red cube"), Prompt("two green cats on a mat"), Prompt("a red cube")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory, "z-image")


def load(folder, **options):
    options = {"lora": LoRA(rank=2), "resolution": 32, "max_sequence_length": 64, "device": "cpu", **options}
    return FlowMatchingPolicy.from_pretrained(folder, **options)


def counted(policy, monkeypatch):
    """What its family is asked to encode from now on."""
    asked, encode = [], policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda texts: asked.extend(texts) or encode(texts))
    return asked


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_encodes_each_text_once_also_for_guidance_and_forks(folder, monkeypatch):
    policy = load(folder)
    asked = counted(policy, monkeypatch)
    first = policy.encode(PROMPTS)
    again = Guided(policy, 2.0, "blur").fork().encode(PROMPTS)
    assert asked == ["a red cube", "two green cats on a mat", "blur"]
    assert same(first.tensors, again.tensors)
    assert torch.equal(first.tensors["embeds"][0], first.tensors["embeds"][2])


def test_ragged_texts_are_padded_with_zeros_and_cut_to_their_own_length(folder):
    policy = load(folder)
    both, alone = policy.encode(PROMPTS[:2]).tensors, policy.encode(PROMPTS[:1]).tensors
    short, long = both["lengths"].tolist()
    assert short < long == both["embeds"].shape[1]
    assert (both["embeds"][0, short:] == 0).all()
    assert alone["embeds"].shape[1] == short
    assert torch.equal(alone["embeds"][0], both["embeds"][0, :short])


def test_a_folder_serves_the_next_run(folder, tmp_path, monkeypatch):
    first = load(folder, cache=str(tmp_path)).encode(PROMPTS).tensors
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    with safe_open(files[0], "pt") as content:
        assert content.metadata()["text"] in PROMPTS
    policy = load(folder, cache=str(tmp_path))
    asked = counted(policy, monkeypatch)
    assert same(policy.encode(PROMPTS).tensors, first)
    assert asked == []
    policy.encode_negative("a red cube")  # a negative text is another thing
    assert asked == ["a red cube"]


@pytest.mark.parametrize("change", [{"max_sequence_length": 48}, {"dtype": "bfloat16"}])
def test_another_length_or_precision_has_files_of_its_own(folder, tmp_path, change):
    load(folder, cache=str(tmp_path)).encode(PROMPTS)
    load(folder, cache=str(tmp_path), **change).encode(PROMPTS)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_variants_in_one_folder_have_files_of_their_own(tmp_path_factory, tmp_path):
    plain, both = saved(tmp_path_factory, "sd3"), tmp_path / "both"
    shutil.copytree(plain, both)
    DiffusionPipeline.from_pretrained(plain, torch_dtype=torch.float16).save_pretrained(both, variant="fp16")
    alone = {variant: load(both, variant=variant).encode(PROMPTS).tensors for variant in ("fp16", None)}
    assert not same(*alone.values())  # the numbers of one are rounded
    for variant, tensors in alone.items():
        assert same(load(both, variant=variant, cache=str(tmp_path / "cache")).encode(PROMPTS).tensors, tensors)


def test_an_encoder_that_a_pipeline_goes_without_is_none_of_its_revision(tmp_path_factory, tmp_path):
    """Its files may still be there: Stable Diffusion 3 without T5 is a line of model_index.json."""
    shutil.copytree(saved(tmp_path_factory, "sd3"), tmp_path / "base")
    whole = load(tmp_path / "base", cache=str(tmp_path / "cache")).encode(PROMPTS).tensors
    file = tmp_path / "base" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    alone = load(tmp_path / "base").encode(PROMPTS).tensors
    assert not same(whole, alone)
    assert same(load(tmp_path / "base", cache=str(tmp_path / "cache")).encode(PROMPTS).tensors, alone)


def test_processes_of_one_number_on_two_machines_do_not_meet(folder, tmp_path, monkeypatch):
    """The second one writes the same text between the first one's writing and renaming."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    first, second = (load(folder, cache=str(tmp_path)) for _ in range(2))
    found = []

    def slowly(tensors, file, **options):
        save_file(tensors, file, **options)
        if not found:
            found.append(None)
            found.append(second.encode(PROMPTS[:1]).tensors)

    monkeypatch.setattr(encodings, "save_file", slowly)
    assert same(first.encode(PROMPTS[:1]).tensors, found[1])
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".safetensors"]


def test_the_revision_follows_the_contents_of_encoders_and_tokenizers_alone(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    before = encoder_revision(copy)
    assert before == encoder_revision(Path(folder))
    (copy / "transformer" / "config.json").write_text("{}")
    assert encoder_revision(copy) == before
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoder_revision(copy) != before


def test_a_file_of_the_hubs_cache_is_known_by_its_name(tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    blob.write_text("weights")
    encoder = tmp_path / "snapshot" / "text_encoder"
    encoder.mkdir(parents=True)
    (encoder / "model.safetensors").symlink_to(blob)
    before = encoder_revision(encoder.parent)
    blob.write_text("not read")
    assert encoder_revision(encoder.parent) == before


def test_a_folder_without_revision_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="Encodings with a folder needs the encoders' revision"):
        Encodings(load(folder).family, tmp_path)


class Lengths:
    """Encodes a text as its length, in 8 bytes; says what it was asked."""

    ragged = ()

    def __init__(self):
        self.asked = []

    def resident(self, prefix):
        return nullcontext()

    def encode(self, texts):
        self.asked.append(list(texts))
        return {"embeds": torch.tensor([[len(text), 0] for text in texts], dtype=torch.float32)}

    def encode_negative(self, text):
        return {"embeds": -self.encode([text])["embeds"]}


CPU = torch.device("cpu")


def held(kept):
    """Bytes of the encoded texts that are in memory."""
    return sum(tensor.nbytes for row in kept._rows.values() for tensor in row.values())


def test_memory_keeps_the_texts_that_were_asked_for_last():
    family = Lengths()
    kept = Encodings(family, limit=24)
    for texts in (["a", "bb", "ccc"], ["a"], ["dddd"], ["a", "ccc", "dddd"], ["bb"]):  # "bb" makes room for "dddd"
        assert kept.of(texts, CPU)["embeds"][:, 0].tolist() == [len(text) for text in texts]
        assert held(kept) <= 24
    assert family.asked == [["a", "bb", "ccc"], ["dddd"], ["bb"]]


@pytest.mark.parametrize("limit", [0, 7, 8])
def test_a_call_gets_all_its_texts_where_memory_holds_one_or_none(limit):
    family = Lengths()
    kept, texts = Encodings(family, limit=limit), ["x" * number for number in range(1, 40)]
    for _ in range(2):
        assert kept.of([*texts, texts[3]], CPU)["embeds"][:, 0].tolist() == [*range(1, 40), 4]
        assert kept.of([texts[2]], CPU, negative=True)["embeds"].tolist() == [[-3, 0]]
        assert held(kept) == limit // 8 * 8
    assert sum(map(len, family.asked)) == 2 * 40


def test_many_prompts_do_not_fill_the_memory_and_a_text_is_encoded_anew_to_the_bit(folder, monkeypatch):
    policy, whole = load(folder), load(folder)
    assert whole.encodings.limit == 2 * 2**30
    whole.encode(PROMPTS[1:2])
    limit = held(whole.encodings)  # room for the longer text alone
    policy.encodings = Encodings(policy.family, limit=limit)
    asked = counted(policy, monkeypatch)
    for prompt in PROMPTS * 2:
        assert same(policy.encode([prompt]).tensors, whole.encode([prompt]).tensors)
    assert asked == [*PROMPTS, *PROMPTS[1:]]  # the third is the first again: two in a row are one
    assert held(policy.encodings) <= limit


def test_a_folder_has_no_limit(tmp_path):
    family = Lengths()
    kept = Encodings(family, tmp_path, "one", limit=0)
    family.dtype, family.max_sequence_length = torch.float32, 8
    for _ in range(2):
        kept.of(["a", "bb"], CPU)
    assert family.asked == [["a", "bb"]]


def test_a_limit_below_none_is_refused():
    with pytest.raises(ValueError, match=r"Encodings\.limit must be a number of bytes, 0 or more; got -1"):
        Encodings(Lengths(), limit=-1)


def test_offloaded_parts_are_on_the_device_only_while_they_work(folder, monkeypatch):
    moves = []
    for kind in ("Qwen3Model", "AutoencoderKL"):
        owner = __import__("transformers" if kind == "Qwen3Model" else "diffusers")
        original = getattr(owner, kind).to
        monkeypatch.setattr(
            getattr(owner, kind), "to", lambda self, place, k=kind, o=original: moves.append((k, str(place))) or o(self, place)
        )
    policy = load(folder, offload=True)
    policy.family.device = torch.device("cpu:0")  # stands for an accelerator
    moves.clear()
    policy.encode(PROMPTS)
    assert moves == [("Qwen3Model", "cpu:0"), ("Qwen3Model", "cpu")]
    policy.encode(PROMPTS)
    assert len(moves) == 2
    images = policy.decode(torch.zeros(1, *policy.latent_shape))
    assert moves[2:] == [("AutoencoderKL", "cpu:0"), ("AutoencoderKL", "cpu")]
    assert torch.equal(images, load(folder).decode(torch.zeros(1, *policy.latent_shape)))
