"""Sets of digits, as rewards and prompts name them."""

from collections.abc import Iterable

CLASSES = tuple(range(10))
"""All digits."""


def classes_of(digits: Iterable[int]) -> tuple[int, ...]:
    """Check that digits are different, and sort them in rising order.

    Raises:
        ValueError: one is no whole number from 0 to 9, or appears twice.
    """
    found = tuple(digits)
    if any(type(digit) is not int or digit not in CLASSES for digit in found) or len(set(found)) < len(found):
        raise ValueError(f"classes must be different whole numbers from 0 to 9; got {list(found)}")
    return tuple(sorted(found))
