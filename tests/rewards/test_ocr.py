"""Text is really read, in images of the package's own generator; how it is compared is checked by hand."""

import itertools
import random
import stat
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import ConfigError, RewardError
from diffalign.rewards import OCR
from diffalign.rewards.ocr import edit_distance, wanted_text
from diffalign.rewards.reading import RapidReader, Reader, TesseractReader
from diffalign.shapeworld.grammar import scenes
from diffalign.shapeworld.render import draw

WORDS = st.text("ab", max_size=5)


class Says(Reader):
    """Reads what it is told."""

    def __init__(self, *texts):
        self.texts = itertools.cycle(texts)

    def read(self, pixels):
        return next(self.texts)


class Remembers(Reader):
    """Reads once what is asked for again later: an image takes a twentieth of a second."""

    def __init__(self, reader):
        self.reader, self.texts = reader, []

    def read(self, pixels):
        self.texts.append(self.reader.read(pixels))
        return self.texts[-1]


def score(wanted, read, **options):
    return OCR(reader=Says(read), **options)(torch.zeros(1, 3, 8, 8), [Prompt("p", {"text": wanted})]).item()


@pytest.fixture(scope="module")
def written():
    """Texts of the generator, drawn at random places, sizes and colours."""
    chosen = random.Random(0).sample(scenes("text"), 40)
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw(scene, generator) for scene in chosen])), [Prompt(scene.caption) for scene in chosen]


def test_rapidocr_reads_the_generators_texts(written):
    images, prompts = written
    reader = Remembers(RapidReader())
    assert OCR("exact", reader=reader)(images, prompts).mean() >= 0.95
    others = OCR("exact", reader=Says(*reader.texts))(images, prompts[1:] + prompts[:1])
    assert others.mean() <= 0.05, "another text is not the one that is wanted"
    blank = torch.full((1, 3, 64, 64), 0.9)
    assert OCR("edit")(blank, prompts[:1]).item() == 0.0


def test_longer_texts_are_read_in_order():
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (256, 256), "white")
    font = ImageFont.load_default(40)
    for place, word in ((40, "OPEN"), (120, "LATE")):
        ImageDraw.Draw(picture).text((60, place), word, fill="black", font=font)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    prompts = [Prompt('a sign "Open late"')]
    assert OCR("exact")(image, prompts).item() == 1.0
    assert OCR("partial")(image, [Prompt('a sign "late"')]).item() == 1.0


def test_the_three_ways_to_compare():
    # kitten -> sitting: 3 edits, 7 letters
    assert score("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert score("kitten", "sitting", match="exact") == 0.0
    assert score("Open Late", "OPEN LATE", match="exact") == 1.0
    assert score("Open Late", "OPEN LATE", match="exact", ignore_case=False) == 0.0
    assert score("cafe", "cafe bar") == pytest.approx(4 / 7)
    assert score("cafe", "the cafe bar", match="partial") == 1.0
    assert score("cafe", "the cafx bar", match="partial") == 0.75
    assert [score("cafe", "", match=match) for match in ("edit", "partial", "exact")] == [0.0, 0.0, 0.0]


@given(WORDS, WORDS)
def test_edit_distance_is_the_shortest_way(first, second):
    assert edit_distance(first, second) == edit_distance(second, first)
    assert abs(len(first) - len(second)) <= edit_distance(first, second) <= max(len(first), len(second))
    assert (edit_distance(first, second) == 0) == (first == second)
    stretches = {second[i:j] for i in range(len(second) + 1) for j in range(i, len(second) + 1)}
    assert edit_distance(first, second, anywhere=True) == min(edit_distance(first, stretch) for stretch in stretches)


@given(WORDS, WORDS, WORDS)
def test_edit_distance_obeys_the_triangle_inequality(first, second, third):
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign saying "Open Late" and "Now"', "Open Late Now"),
        ("a sign saying “Open Late”", "Open Late"),
        ("ein Schild „Offen“", "Offen"),
        ("une enseigne « Ouvert »", "Ouvert"),
        ("a farmer's market isn't here", ""),
        ("the dogs' and the cats' bowls", ""),
        ("a farmer’s market isn’t here", ""),  # noqa: RUF001
        ("a farmer's sign \"Don't stop\"", "Don't stop"),
        ('a 5" pipe', ""),
        ('the text "K7" in blue', "K7"),
        (Prompt('a sign "Yes"', {"text": "No"}), "No"),
        (Prompt("a sign", {"text": 'It\'s "on"'}), 'It\'s "on"'),
        (Prompt("a sign", {"count": 3}), ""),
        (Prompt('a sign "Yes"', {"text": ""}), "Yes"),  # an empty cell of a table
        (Prompt('a sign "Yes"', {"text": " "}), "Yes"),
    ],
)
def test_wanted_text(prompt, text):
    assert wanted_text(prompt) == text


def test_prompts_without_text_are_named_before_anything_is_drawn():
    reward = OCR(reader=Says("x"), key="ocr")
    good = [Prompt('"A"'), Prompt("b", {"ocr": "B"})]
    reward.require(good)
    for bad in (Prompt("a farmer's market"), Prompt("b", {"ocr": " "}), Prompt("b", {"text": "B"})):
        with pytest.raises(ConfigError, match=f"prompt {str(bad)!r} has no metadata 'ocr' and nothing in double quotes"):
            reward.require([*good, bad])
    with pytest.raises(ConfigError, match="metadata 'ocr' of prompt 'b' must be text; got 3"):
        reward.require([Prompt("b", {"ocr": 3})])
    with pytest.raises(ConfigError, match="has no metadata"):
        reward(torch.zeros(1, 3, 8, 8), [Prompt("nothing")])


@pytest.mark.parametrize("module", ["rapidocr", "onnxruntime"])
def test_a_missing_extra_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'diffalign\[ocr\]'"):
        OCR()


def stand_in(folder, monkeypatch, script):
    program = folder / "tesseract"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder))


def test_tesseract_is_given_an_enlarged_picture(tmp_path, monkeypatch):
    script = (
        "import io\nfrom PIL import Image\nimage = Image.open(io.BytesIO(sys.stdin.buffer.read()))\n"
        "print(image.format, *image.size, *sys.argv[1:])"
    )
    stand_in(tmp_path, monkeypatch, script)
    prompts = [Prompt("p", {"text": "PNG 256 128 stdin stdout --psm 6"})]
    assert OCR("exact", engine="tesseract")(torch.zeros(1, 3, 32, 64), prompts).item() == 1.0
    prompts = [Prompt("p", {"text": "PNG 300 200 stdin stdout --psm 6"})]
    assert OCR("exact", engine="tesseract")(torch.zeros(1, 3, 200, 300), prompts).item() == 1.0


def test_a_failure_of_tesseract_is_no_empty_text(tmp_path, monkeypatch):
    prompts = [Prompt("p", {"text": "x"})]
    stand_in(tmp_path, monkeypatch, "sys.exit('no language')")
    with pytest.raises(RewardError, match="tesseract failed with 1: no language"):
        OCR(engine="tesseract")(torch.zeros(1, 3, 64, 64), prompts)
    stand_in(tmp_path, monkeypatch, "time.sleep(60)")
    with pytest.raises(RewardError, match=r"did not read an image within 0\.2 s"):
        OCR(reader=TesseractReader(seconds=0.2))(torch.zeros(1, 3, 64, 64), prompts)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ImportError, match="needs the program tesseract"):
        OCR(engine="tesseract")


def test_a_picture_with_nan_is_no_picture_without_text():
    images = torch.full((1, 3, 8, 8), float("nan"))
    with pytest.raises(ValueError, match="OCR needs images of finite numbers; image 0 of 1, prompt 'p', holds NaN or infinity"):
        OCR(reader=Says("ab"))(images, [Prompt("p", {"text": "ab"})])


def test_a_made_up_engine_is_refused():
    with pytest.raises(ValueError, match=r"OCR\.engine must be one of rapidocr, tesseract; got 'easy'"):
        OCR(engine="easy")
