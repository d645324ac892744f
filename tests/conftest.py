"""One thread, no network, quiet libraries; properties are checked on the same examples at every run."""

import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from diffalign.testing import prepare_second_device

torch.set_num_threads(1)
prepare_second_device()  # before any test makes a backward pass, at which torch counts devices
settings.register_profile(
    "diffalign",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining a failure takes minutes where an example runs a network
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("diffalign")


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the pure functions of the TMPO release, section -> rows."""
    return json.loads((Path(__file__).parent / "data" / "tmpo_golden.json").read_text())
