"""Bearer tokens. They come from the environment, because a run file is copied into the run folder."""

import os
from collections.abc import Mapping


def authorization(variable: str, owner: str) -> Mapping[str, str]:
    """Build the header for the token in an environment variable; empty if the variable is not set.

    Args:
        variable: name of the variable
        owner: name of the client in messages

    Raises:
        ValueError: the token is not printable ASCII on one line, so it cannot be a header.
    """
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{owner}: the token in the environment variable {variable} must be printable ASCII on one line")
    return {"Authorization": f"Bearer {token}"} if token else {}
