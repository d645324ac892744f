"""The device of a policy, by its name."""

import pytest
import torch

from diffalign import placement
from diffalign.placement import taken


@pytest.mark.parametrize(
    ("name", "accelerator", "chosen"),
    [
        ("cuda:1", "cuda", [1]),
        ("cuda", "cuda", []),  # the current one, whichever it is
        ("cpu", "cuda", []),
        ("cuda:1", "xpu", []),
        ("cpu", None, []),
    ],
)
def test_a_named_card_becomes_the_current_one(name, accelerator, chosen, monkeypatch):
    """Memory is counted and calls are recorded on the current one."""
    found = []
    monkeypatch.setattr(placement, "placed", torch.device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None if accelerator is None else torch.device(accelerator))
    monkeypatch.setattr(torch.accelerator, "set_device_index", found.append)
    assert taken(name) == torch.device(name)
    assert found == chosen


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device must be one that torch finds on this machine \(.*cpu.*\) or auto; got 'cuda:77'"):
        taken("cuda:77")
