"""Policies of tiny random pipelines."""

from collections.abc import Callable

import pytest
import torch
from tiny_pipelines import saved

from diffalign.policies import FlowMatchingPolicy, LoRA


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FlowMatchingPolicy]:
    """A family's name and any option of `from_pretrained` -> a policy, with equal adapters each time."""

    def load(name: str = "flux-dev", **options: object) -> FlowMatchingPolicy:
        given = {"lora": LoRA(rank=2), "resolution": 32, "device": "cpu", **options}
        if not name.startswith("sd15") and name != "sdxl":  # UNets have no choice of it
            given.setdefault("max_sequence_length", 24)
        torch.manual_seed(0)
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), **given)

    return load
