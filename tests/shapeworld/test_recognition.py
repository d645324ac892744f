"""Objects and characters are found where they were put, and nothing is found in a background."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import DARK, WHITE, blurred, paint

from diffalign.shapeworld.grammar import COLORS, SHAPES
from diffalign.shapeworld.recognition import find_objects, read_text
from diffalign.shapeworld.render import SIZE

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


@PROPERTY
@given(
    st.sampled_from(list(COLORS)),
    st.sampled_from(SHAPES),
    st.floats(13, 51),
    st.floats(13, 51),
    st.floats(6, 11),
    st.sampled_from([WHITE, DARK, (0.78, 0.73, 0.80), (0.22, 0.17, 0.26), (1.0, 0.98, 0.95)]),
)
def test_finds_colour_shape_place_and_size(color, shape, x, y, radius, background):
    (found,) = find_objects(paint((f"{color} {shape}", x, y, radius), background=background)[None])[0]
    area = {"circle": np.pi, "square": 4 * 0.88**2, "triangle": 2, "cross": 4 * 2 * 0.36 - 4 * 0.36**2}[shape] * radius**2
    assert (found.color, found.shape) == (color, shape)
    assert found.x == pytest.approx(x, abs=1)
    assert found.y == pytest.approx(y, abs=1)
    assert found.area == pytest.approx(area, rel=0.15)
    assert 0.8 < found.quality <= 1


@PROPERTY
@given(st.floats(0.0, 1.0), st.lists(st.floats(-0.05, 0.05), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_a_background_holds_nothing(level, tint, seed):
    image = (torch.tensor([level + channel for channel in tint]).clamp(0, 1)[:, None, None]).expand(3, SIZE, SIZE)
    image = (image + 0.03 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    assert find_objects(image[None]) == [[]]
    assert read_text(image[None]) == [None]


@pytest.mark.parametrize("color", COLORS.values())
def test_one_colour_everywhere_is_background(color):
    assert find_objects(paint(background=color)[None]) == [[]]


def test_another_grey_is_not_an_object():
    image = paint(("red circle", 20, 20, 8))
    image[:, 40:] = 0.1
    assert [(thing.color, thing.shape) for thing in find_objects(image[None])[0]] == [("red", "circle")]


def test_what_hangs_together_is_one_object_however_long_the_way():
    ink = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for turn, top in enumerate(range(0, SIZE - 8, 6)):  # a snake through the whole image, 2 pixels wide
        ink[top : top + 2] = True
        ink[top : top + 8, -2:] |= turn % 2 == 0
        ink[top : top + 8, :2] |= turn % 2 == 1
    snake = torch.where(ink, torch.tensor(COLORS["blue"])[:, None, None], paint(background=DARK))
    assert [thing.area for thing in find_objects(snake[None])[0]] == [ink.sum()]
    cut = snake.clone()
    cut[:, 24:26, 32] = 0.1
    pieces = [thing.area for thing in find_objects(cut[None])[0]]
    assert len(pieces) == 2
    assert sum(pieces) == ink.sum() - 2


def test_touching_objects_of_two_colours_are_two():
    found = find_objects(paint(("red circle", 22, 32, 9), ("blue circle", 39, 32, 9))[None])[0]
    assert {thing.color for thing in found} == {"red", "blue"}
    assert len(found) == 2


def test_specks_are_not_objects_and_the_largest_comes_first():
    image = paint(("red circle", 16, 16, 7), ("red square", 46, 46, 9))
    image[:, 4:8, 50:54] = torch.tensor(COLORS["green"])[:, None, None]  # 16 pixels
    assert [thing.shape for thing in find_objects(image[None])[0]] == ["square", "circle"]


@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_keep_their_name_when_blurred(shape):
    sizes, shifts = np.linspace(6, 8, 9), np.linspace(0, 0.75, 4)
    images = torch.stack([paint((f"red {shape}", 32 + dx, 32 + dy, radius)) for radius in sizes for dx in shifts for dy in shifts])
    found = find_objects(blurred(images, 1.2))
    assert [[thing.shape for thing in things] for things in found] == [[shape]] * len(images)
