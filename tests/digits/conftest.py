"""One embedded flow for all tests; nobody moves it, because forks own all they train."""

import pytest

from diffalign.digits import DigitsPolicy


@pytest.fixture(scope="session")
def base():
    return DigitsPolicy.from_pretrained("digits", device="cpu")
