"""Fields and arguments of a few words: a foreign word is refused where the part is made, not taken for another one later."""

import importlib
import inspect
from pathlib import Path
from typing import Literal

import attrs
import pytest

import diffalign
from diffalign.core.words import allowed_word, require_word, words_of
from diffalign.digits import DigitsPolicy
from diffalign.export import export
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.policies import FlowMatchingPolicy
from diffalign.testing import TinyPolicy
from diffalign.testing.broken import BrokenReplay

ROOT = Path(diffalign.__file__).parent


def fields():
    """Every field of a class of attrs in the package that is annotated with a `Literal` type, or with one or None."""
    for file in sorted(ROOT.rglob("*.py")):
        path = file.relative_to(ROOT.parent).with_suffix("").parts
        if path[-1] == "__main__":
            continue
        module = importlib.import_module(".".join(path[:-1] if path[-1] == "__init__" else path))
        for kind in vars(module).values():
            if inspect.isclass(kind) and attrs.has(kind) and kind.__module__ == module.__name__:
                yield from ((kind, field) for field in attrs.fields(kind) if words_of(field.type))


FIELDS = list(fields())


def name_of(value):
    return value.__name__ if inspect.isclass(value) else value.name


def test_the_walk_finds_fields():
    found = {(name_of(kind), field.name) for kind, field in FIELDS}
    assert len(found) == len(FIELDS) >= 25
    assert {("FlowGRPO", "kl_in"), ("CPS", "density"), ("Judge", "answer_format"), ("HackingAlarm", "action"), ("LoRA", "init")} <= found


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=name_of)
def test_a_field_of_words_refuses_any_other(kind, field):
    assert field.validator is not None, f"{kind.__name__}.{field.name} is checked in run files alone; give it validator=allowed_word"
    part = object.__new__(kind)
    for word in words_of(field.type):
        field.validator(part, field, word)
    for foreign in ("foreign", "", str(words_of(field.type)[0]).capitalize(), 1, []):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{field.name} must be .*{words_of(field.type)[0]}.*; got "):
            field.validator(part, field, foreign)


def test_words_are_those_of_the_type():
    assert words_of(Literal["a", "b"]) == ("a", "b")
    assert words_of(Literal["a"] | None) == ("a", None)
    assert words_of(str | None) == words_of(str) == words_of(None) == words_of(dict[str, Literal["a"]]) == ()


def test_the_message_says_where_what_must_hold_and_what_came():
    for kind, text in (
        (Literal["a", "b"], "^x must be one of a, b; got 'c'$"),
        (Literal["a"] | None, "^x must be a or None; got 'c'$"),
        (Literal["a", "b"] | None, "^x must be one of a, b or None; got 'c'$"),
    ):
        with pytest.raises(ValueError, match=text):
            require_word("x", "c", kind)


def test_a_private_field_is_called_as_its_argument():
    @attrs.frozen
    class Part:
        _way: Literal["up", "down"] = attrs.field(validator=allowed_word)

    with pytest.raises(ValueError, match=r"^Part\.way must be one of up, down; got 'left'$"):
        Part("left")


def test_an_objective_is_not_built_with_a_word_that_it_would_take_for_another():
    with pytest.raises(ValueError, match=r"^FlowGRPO\.kl_in must be one of loss, reward; got 'rewards'$"):
        FlowGRPO(TinyPolicy(), kl_in="rewards")
    with pytest.raises(ValueError, match=r"^SoftmaxTB\.loss must be one of surrogate, squared; got 'surogate'$"):
        SoftmaxTB(TinyPolicy(), loss="surogate")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"quantization": "nf5"}, "^quantization must be one of nf4, int8 or None; got 'nf5'$"),
        ({"compute": "float16"}, "^compute must be bfloat16 or None; got 'float16'$"),
        ({"dtype": "fp16"}, "^dtype must be one of float32, bfloat16, float16; got 'fp16'$"),
    ],
    ids=str,
)
def test_a_pipeline_refuses_a_foreign_word_before_it_reads_anything(argument, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchingPolicy.from_pretrained("nowhere/at-all", device="cpu", **argument)


def test_functions_refuse_a_foreign_word(tmp_path):
    policy = DigitsPolicy.from_pretrained(device="cpu")
    with pytest.raises(ValueError, match=r"^dtype must be one of float32, float16; got 'float64'$"):
        policy.save(str(tmp_path / "saved"), dtype="float64")
    with pytest.raises(ValueError, match=r"^format must be one of diffusers, comfyui, merged; got 'onnx'$"):
        export(policy, tmp_path / "exported", "onnx")
    with pytest.raises(ValueError, match=r"^BrokenReplay\.fault must be one of sigma, .*; got 'sigmas'$"):
        BrokenReplay(TinyPolicy(), "sigmas", 4)
    assert not list(tmp_path.iterdir())
