"""Tokens come from the environment: what stands in a run file is written into the run's folder."""

import os
from collections.abc import Mapping


def authorization(variable: str, owner: str) -> Mapping[str, str]:
    """The header for the token in an environment variable; none where it is not set.

    Args:
        variable: its name
        owner: who asks, in messages

    Raises:
        ValueError: the token cannot stand in a header.
    """
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{owner}: the token in the environment variable {variable} must be printable ASCII on one line")
    return {"Authorization": f"Bearer {token}"} if token else {}
