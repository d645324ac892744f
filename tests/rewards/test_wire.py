"""The protocol: what goes in comes out, and everything else is refused with its place."""

import base64
import contextlib
import io
import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.core import Partial, Prompt
from diffalign.rewards.wire import (
    Limits,
    ScoreRequest,
    WireError,
    decode_scores,
    encode_error,
    encode_request,
    encode_scores,
    error_text,
    pixels_of,
    plain_scores,
    read_request,
    reward_of,
)

PIXELS = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)


def message(**changes):
    good = json.loads(encode_request(ScoreRequest("id-1", PIXELS, (Prompt("a"), Prompt("b", {"n": 1})))))
    return json.dumps({**good, **changes}).encode()


def png(mode="RGB", size=(4, 5), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def text(data):
    return base64.b64encode(data).decode()


@given(st.text(st.characters(codec="utf-8"), max_size=50), st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=3))
def test_a_request_survives_the_journey(words, metadata):
    request = read_request(encode_request(ScoreRequest("a_1-Z", PIXELS[:1], (Prompt(words, metadata),))), Limits())
    assert (request.id, request.prompts, dict(request.prompts[0].metadata)) == ("a_1-Z", (words,), metadata)
    assert torch.equal(request.unpack().images, PIXELS[:1])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_scores_survive_the_journey_exactly(values):
    assert decode_scores(encode_scores("x", values), "x", len(values)) == values


def test_a_source_travels_in_a_message_that_older_ends_refuse():
    sent = encode_request(ScoreRequest("x", PIXELS, (Prompt("a", {}, "likes"), Prompt("b"))))
    assert json.loads(sent)["version"] == 2
    assert [prompt.source for prompt in read_request(sent, Limits()).prompts] == ["likes", None]


def test_what_older_ends_understand_is_sent_as_they_know_it():
    asked = json.loads(encode_request(ScoreRequest("x", PIXELS, (Prompt("a"), Prompt("b", {"n": 1})))))
    assert (asked["version"], asked["prompts"]) == (1, [{"text": "a", "metadata": {}}, {"text": "b", "metadata": {"n": 1}}])
    assert json.loads(encode_scores("x", [0.5, 1.0])) == {"version": 1, "id": "x", "scores": [0.5, 1.0]}


def test_images_without_a_score_travel_in_an_answer_that_older_ends_refuse():
    sent = encode_scores("x", [0.5, None, 0.0])
    assert json.loads(sent) == {"version": 2, "id": "x", "scores": [0.5, None, 0.0]}
    assert decode_scores(sent, "x", 3) == [0.5, None, 0.0]
    with pytest.raises(WireError, match="the score of image 1 of 3 must be a finite number; got None"):
        decode_scores(sent.replace(b'"version":2', b'"version":1'), "x", 3)


@pytest.mark.parametrize("scores", [torch.tensor([0.5, 1.5]), Partial(torch.tensor([0.5, float("nan")]), torch.tensor([True, False]))])
def test_scores_become_plain_values_and_come_back_as_a_reward_returns_them(scores):
    plain = plain_scores(scores)
    back = reward_of(plain, torch.device("cpu"))
    assert type(back) is type(scores)
    assert plain_scores(back) == plain
    assert plain == ([0.5, 1.5] if isinstance(scores, torch.Tensor) else [0.5, None])


def test_pixels_are_rounded_and_held_in_range():
    levels = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 7.0])
    assert pixels_of(levels.expand(1, 3, 1, 7))[0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_messages_for_people():
    assert error_text(encode_error("busy", "come back")) == "come back"
    assert error_text(b"\xff<html>") == repr("\ufffd<html>")


BROKEN = [
    (b"", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 10**5, "not JSON"),
    (b"9" * 10**5, "not JSON"),
    (b"[]", "must be an object; got list"),
    (b"{}", "version must be 1 or 2; got None"),
    (message(version=3), "version must be 1 or 2; got 3"),
    (message(version=True), "version must be 1 or 2; got True"),
    (message(more=1), "must have the keys id, images, prompts, version"),
    (message(id=""), "id must be 1 to 64"),
    (message(id="a\nb"), "id must be 1 to 64"),
    (message(id=7), "id must be 1 to 64"),
    (message(images=[]), "images must be a list of 1 to 64 images; got 0"),
    (message(images="x"), "images must be a list of 1 to 64 images; got str"),
    (message(images=["x"] * 65), "images must be a list of 1 to 64 images; got 65"),
    (message(prompts=[]), "prompts must be a list of 2, one per image; got 0"),
    (message(prompts=["a", "b"]), "prompts[0] must be an object with text and metadata; got 'a'"),
    (message(prompts=[{"text": "a", "metadata": {}}, {"text": 1, "metadata": {}}]), "prompts[1].text must be"),
    (message(prompts=[{"text": "a", "metadata": []}] * 2), "prompts[0].metadata must be an object; got []"),
    (message(prompts=[{"text": "a", "metadata": {}, "source": "x"}] * 2), "prompts[0] must be an object with text and metadata; got"),
    (message(version=2, prompts=[{"text": "a", "source": "x"}] * 2), "an object with text and metadata, and source if it has one; got"),
    (message(version=2, prompts=[{"text": "a", "metadata": {}, "source": 1}] * 2), "prompts[0].source must be null or at most 20000"),
    (message(version=2, prompts=[{"text": "a", "metadata": {}, "source": "x" * 20_001}] * 2), "prompts[0].source must be null or at most"),
    (message(prompts=[{"text": "a" * 20_001, "metadata": {}}] * 2), "prompts[0].text must be at most 20000 characters"),
    (message(prompts=[{"text": "\ud800", "metadata": {}}] * 2), "prompts[0] must be Unicode text"),
    (message(prompts=[{"text": "a", "metadata": {"x": "\ud800"}}] * 2), "prompts[0] must be Unicode text"),
    (message(prompts=[{"text": "a", "metadata": {"x": float("nan")}}] * 2), "prompts[0] must be Unicode text and finite numbers"),
    (message(images=[1, 2]), "images[0] must be the base64 text of a PNG file; got int"),
    (message(images=["ü", "x"]), "images[0] must be base64"),
    (message(images=["aaaa", "x"]), "images[0] must be a PNG file; it is shorter than its header"),
    (message(images=[text(b"GIF89a" + bytes(40))] * 2), "images[0] must be a PNG file; it begins with something else"),
    (message(images=[text(png("RGBA"))] * 2), "images[0] must be 8-bit RGB without alpha; it has bit depth 8 and PNG colour type 6"),
    (message(images=[text(png("L"))] * 2), "PNG colour type 0"),
    (message(images=[text(png()), text(png(size=(4, 6)))]), "must have one size; images[0] is (4, 5), images[1] is (4, 6)"),
    (message(images=[text(png(size=(6000, 3000)))] * 2), "at most 33554432 pixels together; got 36000000"),
]


@pytest.mark.parametrize(("body", "error"), BROKEN)
def test_what_is_broken_is_named(body, error):
    with pytest.raises(WireError) as caught:
        read_request(body, Limits())
    assert error in str(caught.value)
    assert len(str(caught.value)) < 500


def bomb():
    """A header of 4 x 5 pixels before the data of 4,000,000."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", 4, 5, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(12_000_000))) + chunk(b"IEND", b"")


def test_damage_inside_a_picture_is_found_when_it_is_unpacked():
    good = png()
    for damaged in (good[:46], good[:45] + bytes(12) + good[57:], good[:33]):
        request = read_request(message(images=[text(good), text(damaged)]), Limits())
        with pytest.raises(WireError, match=r"images\[1\] is a damaged PNG file"):
            request.unpack()


def test_a_picture_holds_no_more_than_its_header_says():
    assert read_request(message(images=[text(bomb())] * 2), Limits()).unpack().images.shape == (2, 3, 5, 4)


@given(st.data())
def test_damaged_requests_give_no_other_error(data):
    body = bytearray(message(images=[text(png())] * 2))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(WireError):
        read_request(bytes(body), Limits()).unpack()


def test_the_documented_messages_are_the_protocol():
    page = (Path(__file__).parents[2] / "docs" / "reward_server.md").read_text()
    asked, answered = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    request = read_request(asked.encode(), Limits())
    assert request.unpack().images[0].flatten(1).T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert dict(request.prompts[0].metadata) == {"target": "square", "count": 1}
    assert decode_scores(answered.encode(), request.id, 1) == [0.25]
