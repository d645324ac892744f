"""Noise grids and scalars."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import Constant, Cosine, Linear, Progress, Ramp, ShiftedGrid, resolution_shift, scalar, shifted_sigmas


@given(st.integers(1, 100), st.floats(0.1, 10))
def test_grids_fall_strictly_from_1_to_0(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


@given(st.integers(1, 100))
def test_shift_1_is_the_uniform_grid(steps):
    torch.testing.assert_close(shifted_sigmas(steps), torch.linspace(1, 0, steps + 1), rtol=0, atol=1e-7)


@given(st.integers(2, 50), st.floats(0.2, 5), st.floats(0.2, 5))
def test_shifts_compose_by_their_product(steps, one, other):
    once = shifted_sigmas(steps, one).double()
    twice = other * once / (1 + (other - 1) * once)
    torch.testing.assert_close(twice.float(), shifted_sigmas(steps, one * other), rtol=1e-5, atol=1e-7)


def test_grids_refuse_no_steps_and_no_shift():
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        shifted_sigmas(0)
    with pytest.raises(ValueError, match="shift must be positive; got 0"):
        shifted_sigmas(4, 0)
    with pytest.raises(ValueError, match="shift"):
        ShiftedGrid(0.0)


def test_a_grid_is_a_value():
    assert ShiftedGrid(3.0) == ShiftedGrid(3.0)
    assert torch.equal(ShiftedGrid(3.0)(6), shifted_sigmas(6, 3.0))


def test_the_resolution_shift_passes_through_its_two_points():
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    assert resolution_shift(20, (10, 1.0), (20, 2.0)) == pytest.approx(math.exp(2.0))


def test_resolution_shifts_agree_with_the_release(golden):
    for row in golden["calculate_flux_shift"]:
        assert resolution_shift(row["image_seq_len"]) == pytest.approx(row["shift"], rel=1e-6)


def test_grids_agree_with_the_release(golden):
    for row in golden["build_sigma_schedule"]:
        options = row["kwargs"]
        shift = options["shift"]
        if options.get("is_flux") and options.get("use_flux_dynamic_shift", True):
            base = (options.get("flux_base_seq_len", 256), options.get("flux_base_shift", 0.5))
            top = (options.get("flux_max_seq_len", 4096), options.get("flux_max_shift", 1.15))
            shift = resolution_shift(options["image_seq_len"], base, top)
        torch.testing.assert_close(shifted_sigmas(options["num_steps"], shift), torch.tensor(row["sigmas"]), rtol=1e-6, atol=1e-7)


def test_linear_reaches_its_end_and_stays():
    assert [Linear(1.0, 3.0, 4)(Progress(step, 100)) for step in (0, 2, 4, 50)] == [1.0, 2.0, 3.0, 3.0]


def test_linear_is_the_warm_up_of_the_release(golden):
    for row in golden["beta_warmup"]:
        warmup = Linear(row["beta"], row["beta_target"], row["warmup"])
        assert warmup(Progress(row["step"], 1000)) == pytest.approx(row["value"], rel=1e-6)


def test_a_ramp_rises_to_its_limit():
    assert [Ramp(0.5, 0.25, 1.0)(Progress(step, 100)) for step in (0, 1, 2, 3, 50)] == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_covers_the_whole_run():
    values = [Cosine(1.0, 3.0)(Progress(step, 5)) for step in range(5)]
    assert values[0] == pytest.approx(1.0)
    assert values[2] == pytest.approx(2.0)
    assert values[1] == pytest.approx(2 - math.cos(math.pi / 4))
    assert values[4] == pytest.approx(3.0)


def test_a_plain_number_is_a_constant():
    assert scalar(2) == Constant(2.0)
    assert scalar(2)(Progress(7, 9)) == 2.0
    warmup = Linear(0.0, 1.0, 3)
    assert scalar(warmup) is warmup


def test_linear_refuses_no_steps():
    with pytest.raises(ValueError, match="steps"):
        Linear(0.0, 1.0, 0)
