"""Network rows that the updates of a step evaluate, for forecasts."""

import attrs


@attrs.frozen
class UpdateRows:
    """Network rows that updates evaluate for one prompt.

    Args:
        trained: rows of each loss with gradient, all at once
        frozen: rows of each pass without gradient; a guided evaluation has two
        compared: those of `trained` whose rows a loss compares with each other; in pieces they are evaluated once more, without gradient
    """

    trained: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    compared: tuple[int, ...] = ()

    def __add__(self, other: "UpdateRows") -> "UpdateRows":
        return UpdateRows(self.trained + other.trained, self.frozen + other.frozen, self.compared + other.compared)

    def __mul__(self, times: int) -> "UpdateRows":
        return UpdateRows(self.trained * times, self.frozen * times, self.compared * times)
