"""Numbers for tests of the few-step components."""

import torch
from hypothesis import strategies as st

LEVELS = st.floats(0.0, 0.98)


def full(value, count=1):
    return torch.full((count,), float(value), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
