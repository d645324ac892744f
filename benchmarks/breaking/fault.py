"""What a case of the fuzz raises where something is wrong."""


class FaultError(AssertionError):
    """A case that shows a fault: an error that is not ours, or a result that nobody was told of."""
