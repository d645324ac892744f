"""Every test of this folder runs on the pretended device, which refuses what a GPU refuses."""

import pytest
import torch

from diffalign.testing import second_device


@pytest.fixture(autouse=True)
def traffic():
    before = torch.get_default_dtype()
    with second_device() as counted:
        yield counted
    assert torch.get_default_dtype() == before
